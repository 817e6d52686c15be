"""What an ablation says: losses beside the baseline's, weights and updates, and every reason to doubt them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from moonlight.placement.param_groups import MATRIX_GROUPS
from moonlight.studies.ablation import Ablation, AblationRun
from moonlight.studies.grid import on_edge
from moonlight.studies.measured import Measured
from moonlight.studies.outcome import VariantResult, curve_differences, loss_differences
from moonlight.studies.results import StudyResult, losses
from moonlight.studies.weights import KINDS

Outcomes = Mapping[str, VariantResult]
PARTS, TENTHS = 4, 10
"""Of a run: over which differences of the training loss are told, and after which changes of sign are looked for."""


def loss_table(ablation: Ablation, outcomes: Outcomes) -> str:
    """Every variant and learning rate, as Markdown; the best rate of a variant in bold if there are several."""
    base = outcomes[ablation.baseline]
    head = ["variant", "learning rate", "held-out loss", *(f"seed {seed}" for seed in ablation.seeds)]
    lines = _rows([*head, "difference from the baseline", "seconds of a run"])
    for variant, outcome in outcomes.items():
        for rate, runs in outcome.by_rate.items():
            mean = _loss(outcome.mean(rate))
            is_base = variant == ablation.baseline and rate == outcome.best
            cells = [variant, f"{rate:g}", f"**{mean}**" if rate == outcome.best and len(ablation.rates) > 1 else mean]
            cells += [_loss(runs[seed].loss) if seed in runs else "" for seed in ablation.seeds]
            cells.append("baseline" if is_base else _spread(loss_differences(runs, base.runs)))
            lines += _rows([*cells, f"{fmean(run.seconds for run in runs.values()):.0f}"], head=False)
    return "\n".join(lines)


def _loss(value: float | None) -> str:
    return "diverged" if value is None or math.isinf(value) else f"{value:.4f}"


def _spread(values: Sequence[float]) -> str:
    """Mean, and the least and the largest of the seeds."""
    if not values:
        return ""
    return f"{fmean(values):+.4f}" + (f" [{min(values):+.4f}, {max(values):+.4f}]" if len(values) > 1 else "")


def _rows(cells: Sequence[str], *, head: bool = True) -> list[str]:
    return [f"| {' | '.join(cells)} |", *(["|" + "---|" * len(cells)] if head else [])]


def course_table(ablation: Ablation, outcomes: Outcomes) -> str:
    """Training loss less the baseline's, over the parts of the run, and where it changes its sign, tenths of the run
    taken as one; empty if no curves are known."""
    lines = []
    for variant, outcome in outcomes.items():
        found = curve_differences(outcome.runs, outcomes[ablation.baseline].runs)
        if variant != ablation.baseline and found and len(found[0][0]) >= TENTHS:
            tokens, every = found[0][0], [less for _, less in found]
            parts = [_spread([fmean(less[part]) for less in every]) for part in _parts(len(tokens), PARTS)]
            tenths = [(part.stop, fmean(fmean(less[part]) for less in every)) for part in _parts(len(tokens), TENTHS)]
            signs = [tokens[stop - 1] / 1e6 for (stop, mean), (_, then) in pairwise(tenths) if mean * then < 0]
            where = ", ".join(f"{millions:.2f}" for millions in signs) or "never"
            lines += _rows([variant, *parts, where], head=False)
    head = ["variant", *(f"{100 * part // PARTS} to {100 * (part + 1) // PARTS}%" for part in range(PARTS))]
    return "\n".join([*_rows([*head, "changes sign at (million tokens)"]), *lines]) if lines else ""


def _parts(length: int, count: int) -> list[slice]:
    return [slice(part * length // count, (part + 1) * length // count) for part in range(count)]


def matrices_text(outcomes: Outcomes, weight_rms: Measured) -> str:
    """RMS of weights and updates and SVD entropy, by kind or group of matrices: means over seeds, at the best rates."""
    tables = [
        _matrices_table(
            "RMS of the weights at the end", outcomes, lambda run: weight_rms.get(run.point.name, {}), KINDS
        ),
        _matrices_table("RMS of the last update, before the learning rate", outcomes, lambda run: run.update_rms),
        _matrices_table("SVD entropy of the weights, when last watched", outcomes, lambda run: run.svd_entropy),
    ]
    return "\n\n".join(text for text in tables if text)


def _matrices_table(
    title: str,
    outcomes: Outcomes,
    of_run: Callable[[StudyResult[AblationRun]], Mapping[str, float]],
    columns: Iterable[str] = MATRIX_GROUPS,
) -> str:
    means: dict[str, dict[str, float]] = {}
    for variant, outcome in outcomes.items():
        values = [of_run(run) for run in outcome.runs.values()]
        shared = [name for name in columns if values and all(name in one for one in values)]
        means[variant] = {name: fmean(one[name] for one in values) for name in shared}
    shown = [name for name in columns if any(name in one for one in means.values())]
    if not shown:
        return ""
    lines = _rows(["variant", *(name.replace("_", " ") for name in shown)])
    for variant, one in means.items():
        lines += _rows([variant, *(f"{one[name]:.4f}" if name in one else "" for name in shown)], head=False)
    return f"{title}:\n\n" + "\n".join(lines)


def verdict(ablation: Ablation, outcomes: Outcomes) -> str:
    """Which variant has the least loss; over a varied number, whether both ends are worse. Empty without results."""
    best = {name: one.mean(one.best) for name, one in outcomes.items() if one.best is not None}
    if not best:
        return ""
    least = min(best, key=lambda name: best[name])
    said = f"The least loss is that of {least}, {best[least]:.4f}."
    known = [name for name in ablation.numbers if name in best]
    if len(known) < 2:
        return said
    ends, least = (known[0], known[-1]), min(known, key=lambda name: best[name])
    said += f" Over {ablation.varied} it is least at {ablation.numbers[least]:g}"
    if least in ends:
        return f"{said}, the {'lower' if least == ends[0] else 'upper'} end: not yet an optimum."
    worse = " and ".join(f"at {ablation.numbers[name]:g} by {best[name] - best[least]:.4f}" for name in ends)
    return f"{said}; both ends are worse, {worse}."


def ablation_caveats(ablation: Ablation, outcomes: Outcomes) -> list[str]:
    """Runs that diverged or are missing, and learning rates that are best at an edge."""
    every = {run.point: run for one in outcomes.values() for runs in one.by_rate.values() for run in runs.values()}
    said = [f"{trial.name} diverged ({run.diverged})." for trial, run in every.items() if run.diverged]
    for variant, outcome in outcomes.items():
        means = {rate: outcome.mean(rate) for rate in outcome.by_rate}
        if outcome.best is not None and len(means) > 1 and (edge := on_edge(means)):
            said.append(f"{variant} is best at {outcome.best:g}, the {edge} edge of its learning rates.")
    if missing := ablation.pending_runs(losses(every)):
        names = ", ".join(trial.name for trial in missing[:3])
        said.append(f"{len(missing)} runs are still to be done: {names}{', ...' if missing[3:] else ''}.")
    return said
