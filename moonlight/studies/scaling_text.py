"""Tables of a scaling ladder: losses of the grid, fitted laws, and caveats."""

import math
from collections.abc import Mapping
from dataclasses import replace

from moonlight.studies.fit import Comparison, Interval, SizeLosses
from moonlight.studies.grid import best_rate, on_edge
from moonlight.studies.ladder import OPTIMIZERS, Ladder, LadderRun, best_points, losses_at
from moonlight.studies.results import StudyResult, losses, markdown_table
from moonlight.studies.scaling_picture import LABELS

PAPER = "Paper, dense, 0.4 to 1.5 billion parameters: Muon 2.506 C^-0.052, AdamW 2.608 C^-0.054, ratio 0.519"


def best_losses(
    ladder: Ladder, results: Mapping[LadderRun, StudyResult[LadderRun]]
) -> dict[str, dict[str, SizeLosses]]:
    """Return the losses at the best learning rate by optimizer and size, without sizes whose runs all diverged."""
    size_losses: dict[str, dict[str, SizeLosses]] = {name: {} for name in OPTIMIZERS}
    for (size, name), best in best_points(ladder, losses(results)).items():
        runs = [results.get(replace(best, seed=seed)) for seed in ladder.seeds]
        seed_losses = tuple(run.loss for run in runs if run and run.loss is not None)
        size_losses[name][size] = SizeLosses(results[best].flops, seed_losses)
    return size_losses


def grid_table(ladder: Ladder, results: Mapping[LadderRun, StudyResult[LadderRun]]) -> str:
    """Return a Markdown table of the loss by size, optimizer and learning rate, the best in bold with all its seeds."""
    rates = sorted({point.rate for point in results})
    if not rates:
        return "No run has finished."
    rows = []
    for size in ladder.sizes:
        for name, values in losses_at(ladder, size, losses(results)).items():
            cells = [size, LABELS[name]]
            for rate in rates:
                runs = [run for seed in ladder.seeds if (run := results.get(LadderRun(size, name, rate, seed)))]
                texts = ["diverged" if run.loss is None else f"{run.loss:.4f}" for run in runs]
                is_best = values and rate == best_rate(values)
                cells.append(" ".join([f"**{texts[0]}**", *texts[1:]] if is_best and texts else texts))
            rows.append(cells)
    return markdown_table(["size", "optimizer", *(f"{rate:g}" for rate in rates)], rows)


def ladder_caveats(ladder: Ladder, results: Mapping[LadderRun, StudyResult[LadderRun]]) -> list[str]:
    """Return one line for each run that diverged, each best learning rate at an edge, and the pending runs."""
    caveats = [
        f"{point.name} diverged ({result.diverged}): the fit excludes it."
        for point, result in results.items()
        if result.diverged
    ]
    for size in ladder.sizes:
        for name, values in losses_at(ladder, size, losses(results)).items():
            if values and (edge := on_edge(values)):
                best = best_rate(values)
                diverged, label = math.isinf(values[best]), LABELS[name]
                reason = f"every run of {label} diverged" if diverged else f"{label} is best at {best:g}"
                caveats.append(f"{size}: {reason}, the {edge} edge of the grid: not yet an optimum.")
    if pending := ladder.pending_runs(losses(results)):
        names = ", ".join(point.name for point in pending[:3])
        caveats.append(f"At least {len(pending)} runs are pending: {names}{', ...' if pending[3:] else ''}.")
    return caveats


def _interval_text(values: Interval, digits: int) -> str:
    low, high = (f"{value:.{digits}f}" if math.isfinite(value) else "unbounded" for value in values)
    return f"[{low}, {high}]"


def laws_text(comparison: Comparison) -> str:
    """Return tables of the fitted laws and of the FLOPs ratios, with 95% intervals."""
    lines = ["L = a C^b, C in PFLOP/s-days; 95% intervals by bootstrap over sizes and seeds:\n"]
    lines += ["| optimizer | a | b | largest distance from the line |", "|---|---|---|---|"]
    for name, law in comparison.laws.items():
        lines.append(
            f"| {LABELS[name]} | {law.a:.4f} {_interval_text(law.a_interval, 4)} | "
            f"{law.b:.4f} {_interval_text(law.b_interval, 4)} | {law.max_deviation:.1%} of its loss |"
        )
    ratio_header = ["| AdamW's FLOPs | its loss | Muon's FLOPs for that loss, over AdamW's |", "|---|---|---|"]
    lines += ["", *ratio_header]
    for ratio in comparison.ratios:
        extrapolated = "" if ratio.is_measured else ", extrapolated"
        text = f"{ratio.ratio:.3f} {_interval_text(ratio.interval, 3)}{extrapolated}"
        lines.append(f"| {ratio.flops:.3g} | {ratio.loss:.4f} | {text} |")
    text = "Without a law: at each size of AdamW, interpolated between Muon's sizes; 95% intervals over seeds.\n"
    lines += ["", text, *ratio_header]
    for ratio in comparison.interpolated:
        text = f"{ratio.ratio:.3f} {_interval_text(ratio.interval, 3)}"
        if ratio.ratio == 0:
            text = f"below {ratio.interval[1]:.3f}: Muon's smallest size has a smaller loss"
        elif math.isinf(ratio.ratio):
            text = f"above {ratio.interval[0]:.3f}: Muon's largest size has a larger loss"
        lines.append(f"| {ratio.flops:.3g} | {ratio.loss:.4f} | {text} |")
    middle = comparison.middle
    low, high = middle.interval
    verdict = "less than AdamW" if high < 1 else "more than AdamW" if low > 1 else "no significant difference"
    lines.append(f"\nMuon needs {middle.ratio:.3f} {_interval_text(middle.interval, 3)} of AdamW's FLOPs: {verdict}.\n")
    lines.append(f"{PAPER}. FLOPs are the model's, as in the paper, without those of the optimizers.")
    return "\n".join(lines)
