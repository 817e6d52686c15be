"""What a ladder says: the whole grid as a table, the laws, and every reason to doubt them."""

import math
from collections.abc import Mapping
from dataclasses import replace

from moonlight.studies.fit import Comparison, Interval, SizeLosses
from moonlight.studies.grid import best_rate, on_edge
from moonlight.studies.ladder import OPTIMIZERS, Ladder, LadderRun, best_points, losses_at
from moonlight.studies.results import StudyResult, losses
from moonlight.studies.scaling_picture import LABELS

PAPER = "Moonlight's, dense, 0.4 to 1.5 billion parameters: Muon 2.506 C^-0.052, AdamW 2.608 C^-0.054, share 0.519"


def best_losses(
    ladder: Ladder, results: Mapping[LadderRun, StudyResult[LadderRun]]
) -> dict[str, dict[str, SizeLosses]]:
    """By optimizer and size, the losses at the best learning rate; without sizes where no run has ended well."""
    cells: dict[str, dict[str, SizeLosses]] = {name: {} for name in OPTIMIZERS}
    for (size, name), best in best_points(ladder, losses(results)).items():
        runs = [results.get(replace(best, seed=seed)) for seed in ladder.seeds]
        known = tuple(run.loss for run in runs if run and run.loss is not None)
        cells[name][size] = SizeLosses(results[best].flops, known)
    return cells


def grid_table(ladder: Ladder, results: Mapping[LadderRun, StudyResult[LadderRun]]) -> str:
    """Loss at every size, optimizer and learning rate, as Markdown; the best in bold, with its other seeds."""
    rates = sorted({point.rate for point in results})
    if not rates:
        return "No run has ended yet."
    lines = ["| size | optimizer | " + " | ".join(f"{rate:g}" for rate in rates) + " |"]
    lines.append("|---|---" + "|---" * len(rates) + "|")
    for size in ladder.sizes:
        for name, values in losses_at(ladder, size, losses(results)).items():
            cells = []
            for rate in rates:
                runs = [run for seed in ladder.seeds if (run := results.get(LadderRun(size, name, rate, seed)))]
                words = ["diverged" if run.loss is None else f"{run.loss:.4f}" for run in runs]
                best = values and rate == best_rate(values)
                cells.append(" ".join([f"**{words[0]}**", *words[1:]] if best and words else words))
            lines.append(f"| {size} | {LABELS[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ladder_caveats(ladder: Ladder, results: Mapping[LadderRun, StudyResult[LadderRun]]) -> list[str]:
    """What keeps the table from being the last word: runs that diverged or are missing, bests at an edge."""
    said = [
        f"{point.name} diverged ({result.diverged}): it is left out of the fit."
        for point, result in results.items()
        if result.diverged
    ]
    for size in ladder.sizes:
        for name, values in losses_at(ladder, size, losses(results)).items():
            if values and (edge := on_edge(values)):
                best = best_rate(values)
                diverged, label = math.isinf(values[best]), LABELS[name]
                why = f"every run of {label} diverged" if diverged else f"{label} is best at {best:g}"
                said.append(f"{size}: {why}, the {edge} edge of the grid: not yet an optimum.")
    if missing := ladder.pending_runs(losses(results)):
        names = ", ".join(point.name for point in missing[:3])
        said.append(f"At least {len(missing)} runs are still to be done: {names}{', ...' if missing[3:] else ''}.")
    return said


def _between(values: Interval, digits: int) -> str:
    low, high = (f"{value:.{digits}f}" if math.isfinite(value) else "no end" for value in values)
    return f"[{low}, {high}]"


def laws_text(comparison: Comparison) -> str:
    """The fitted laws and the share of FLOPs, with 95% intervals."""
    lines = ["L = a C^b, C in PFLOP/s-days; 95% intervals by bootstrap over sizes and seeds:\n"]
    lines += ["| optimizer | a | b | farthest size from the line |", "|---|---|---|---|"]
    for name, law in comparison.laws.items():
        lines.append(
            f"| {LABELS[name]} | {law.a:.4f} {_between(law.a_interval, 4)} | "
            f"{law.b:.4f} {_between(law.b_interval, 4)} | {law.max_deviation:.1%} of its loss |"
        )
    lines += ["", "| AdamW's FLOPs | its loss | Muon's FLOPs for that loss, over AdamW's |", "|---|---|---|"]
    for share in comparison.shares:
        beyond = "" if share.is_measured else ", beyond the ladder"
        said = f"{share.share:.3f} {_between(share.interval, 3)}{beyond}"
        lines.append(f"| {share.flops:.3g} | {share.loss:.4f} | {said} |")
    lines += [
        "",
        "Without a law: at each size of AdamW, between the neighbouring sizes of Muon; 95% intervals of the seeds.\n",
    ]
    lines += ["| AdamW's FLOPs | its loss | Muon's FLOPs for that loss, over AdamW's |", "|---|---|---|"]
    for share in comparison.interpolated:
        said = f"{share.share:.3f} {_between(share.interval, 3)}"
        if share.share == 0:
            said = f"below {share.interval[1]:.3f}: Muon's smallest size has less loss"
        elif math.isinf(share.share):
            said = f"above {share.interval[0]:.3f}: Muon's largest size has more loss"
        lines.append(f"| {share.flops:.3g} | {share.loss:.4f} | {said} |")
    middle = comparison.middle
    low, high = middle.interval
    verdict = "less than AdamW" if high < 1 else "more than AdamW" if low > 1 else "no proven difference"
    lines += ["", f"Muon needs {middle.share:.3f} {_between(middle.interval, 3)} of AdamW's FLOPs: {verdict}.", ""]
    lines.append(f"{PAPER}. FLOPs are the model's, as in the paper; those of the optimizers are not counted.")
    return "\n".join(lines)
