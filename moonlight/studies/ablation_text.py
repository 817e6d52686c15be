"""Tables of an ablation: losses compared with the baseline, weights and updates, and caveats."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from moonlight.placement.param_groups import MATRIX_GROUPS
from moonlight.studies.ablation import Ablation, AblationRun
from moonlight.studies.grid import on_edge
from moonlight.studies.measured import Measured
from moonlight.studies.outcome import VariantResult, curve_differences, loss_differences
from moonlight.studies.results import StudyResult, losses, markdown_table
from moonlight.studies.weights import KINDS

Outcomes = Mapping[str, VariantResult]
PARTS, TENTHS = 4, 10
"""Equal parts of a run: PARTS for the table of differences, TENTHS to search for changes of sign."""


def loss_table(ablation: Ablation, outcomes: Outcomes) -> str:
    """Return a Markdown table of every variant and learning rate, with the best of several rates in bold."""
    baseline = outcomes[ablation.baseline]
    header = ["variant", "learning rate", "held-out loss", *(f"seed {seed}" for seed in ablation.seeds)]
    rows = []
    for variant, outcome in outcomes.items():
        for rate, runs in outcome.by_rate.items():
            mean = _loss(outcome.mean(rate))
            is_baseline = variant == ablation.baseline and rate == outcome.best
            cells = [variant, f"{rate:g}", f"**{mean}**" if rate == outcome.best and len(ablation.rates) > 1 else mean]
            cells += [_loss(runs[seed].loss) if seed in runs else "" for seed in ablation.seeds]
            cells.append("baseline" if is_baseline else _spread(loss_differences(runs, baseline.runs)))
            rows.append([*cells, f"{fmean(run.seconds for run in runs.values()):.0f}"])
    return markdown_table([*header, "difference from the baseline", "seconds of a run"], rows)


def _loss(value: float | None) -> str:
    return "diverged" if value is None or math.isinf(value) else f"{value:.4f}"


def _spread(values: Sequence[float]) -> str:
    """Format the mean over seeds, and the smallest and largest value if there are several."""
    if not values:
        return ""
    return f"{fmean(values):+.4f}" + (f" [{min(values):+.4f}, {max(values):+.4f}]" if len(values) > 1 else "")


def course_table(ablation: Ablation, outcomes: Outcomes) -> str:
    """Return a table of training loss minus the baseline's over parts of the run, and of where it changes sign.

    The sign is that of the mean over a tenth of the run. The table is empty without curves.
    """
    rows = []
    for variant, outcome in outcomes.items():
        curves = curve_differences(outcome.runs, outcomes[ablation.baseline].runs)
        if variant != ablation.baseline and curves and len(curves[0][0]) >= TENTHS:
            tokens, by_seed = curves[0][0], [differences for _, differences in curves]
            parts = [_spread([fmean(values[part]) for values in by_seed]) for part in _parts(len(tokens), PARTS)]
            tenths = [
                (part.stop, fmean(fmean(values[part]) for values in by_seed)) for part in _parts(len(tokens), TENTHS)
            ]
            changes = [
                tokens[stop - 1] / 1e6 for (stop, mean), (_, next_mean) in pairwise(tenths) if mean * next_mean < 0
            ]
            rows.append([variant, *parts, ", ".join(f"{millions:.2f}" for millions in changes) or "never"])
    header = ["variant", *(f"{100 * part // PARTS} to {100 * (part + 1) // PARTS}%" for part in range(PARTS))]
    return markdown_table([*header, "changes sign at (million tokens)"], rows) if rows else ""


def _parts(length: int, count: int) -> list[slice]:
    return [slice(part * length // count, (part + 1) * length // count) for part in range(count)]


def matrices_text(outcomes: Outcomes, weight_rms: Measured) -> str:
    """Return tables of RMS of weights and updates and of SVD entropy: means over seeds, at the best rates."""
    tables = [
        _matrices_table(
            "RMS of the weights at the end", outcomes, lambda run: weight_rms.get(run.point.name, {}), KINDS
        ),
        _matrices_table("RMS of the last update, before the learning rate", outcomes, lambda run: run.update_rms),
        _matrices_table("SVD entropy of the weights, last monitored", outcomes, lambda run: run.svd_entropy),
    ]
    return "\n\n".join(text for text in tables if text)


def _matrices_table(
    title: str,
    outcomes: Outcomes,
    run_values: Callable[[StudyResult[AblationRun]], Mapping[str, float]],
    columns: Iterable[str] = MATRIX_GROUPS,
) -> str:
    means: dict[str, dict[str, float]] = {}
    for variant, outcome in outcomes.items():
        by_seed = [run_values(run) for run in outcome.runs.values()]
        common = [name for name in columns if by_seed and all(name in values for values in by_seed)]
        means[variant] = {name: fmean(values[name] for values in by_seed) for name in common}
    shown = [name for name in columns if any(name in values for values in means.values())]
    if not shown:
        return ""
    rows = [
        [variant, *(f"{values[name]:.4f}" if name in values else "" for name in shown)]
        for variant, values in means.items()
    ]
    return f"{title}:\n\n" + markdown_table(["variant", *(name.replace("_", " ") for name in shown)], rows)


def verdict(ablation: Ablation, outcomes: Outcomes) -> str:
    """Return which variant has the smallest loss and, over a varied number, whether both ends are worse.

    The text is empty without results.
    """
    losses = {name: outcome.mean(outcome.best) for name, outcome in outcomes.items() if outcome.best is not None}
    if not losses:
        return ""
    best = min(losses, key=lambda name: losses[name])
    text = f"{best} has the smallest loss, {losses[best]:.4f}."
    numbered = [name for name in ablation.numbers if name in losses]
    if len(numbered) < 2:
        return text
    ends, best = (numbered[0], numbered[-1]), min(numbered, key=lambda name: losses[name])
    text += f" Over {ablation.varied} the loss is smallest at {ablation.numbers[best]:g}"
    if best in ends:
        return f"{text}, the {'lower' if best == ends[0] else 'upper'} end: not yet an optimum."
    larger = " and ".join(f"at {ablation.numbers[name]:g} by {losses[name] - losses[best]:.4f}" for name in ends)
    return f"{text}; both ends are worse, {larger}."


def ablation_caveats(ablation: Ablation, outcomes: Outcomes) -> list[str]:
    """Return one line for each run that diverged, each best learning rate at an edge, and the pending runs."""
    results = {
        run.point: run for outcome in outcomes.values() for runs in outcome.by_rate.values() for run in runs.values()
    }
    caveats = [f"{trial.name} diverged ({run.diverged})." for trial, run in results.items() if run.diverged]
    for variant, outcome in outcomes.items():
        means = {rate: outcome.mean(rate) for rate in outcome.by_rate}
        if outcome.best is not None and len(means) > 1 and (edge := on_edge(means)):
            caveats.append(f"{variant} is best at {outcome.best:g}, the {edge} edge of its learning rates.")
    if pending := ablation.pending_runs(losses(results)):
        names = ", ".join(trial.name for trial in pending[:3])
        caveats.append(f"{len(pending)} runs are pending: {names}{', ...' if pending[3:] else ''}.")
    return caveats
