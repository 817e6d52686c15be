"""Results of each variant of an ablation, at its best learning rate and relative to the baseline."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from moonlight.studies.ablation import Ablation, AblationRun
from moonlight.studies.grid import best_rate
from moonlight.studies.results import StudyResult

Runs = Mapping[int, StudyResult[AblationRun]]
"""Seed -> result."""


@dataclass(frozen=True)
class VariantResult:
    """All runs of one variant."""

    by_rate: Mapping[float, Runs]
    """Learning rate -> results of all seeds."""

    def mean(self, rate: float) -> float:
        """Return the mean held-out loss over seeds, nats per token; infinite if a seed diverged."""
        return fmean(math.inf if run.loss is None else run.loss for run in self.by_rate[rate].values())

    @property
    def best(self) -> float | None:
        """Learning rate with the smallest mean loss, or None if a seed diverged at every rate."""
        means = {rate: self.mean(rate) for rate in self.by_rate}
        return best_rate(means) if means and math.isfinite(min(means.values())) else None

    @property
    def runs(self) -> Runs:
        """Results at the best learning rate; empty if there is none."""
        return self.by_rate[self.best] if self.best is not None else {}


def variant_results(
    ablation: Ablation, results: Mapping[AblationRun, StudyResult[AblationRun]]
) -> dict[str, VariantResult]:
    """Group the results by variant, in the order of the ablation's file."""
    by_variant: dict[str, dict[float, dict[int, StudyResult[AblationRun]]]] = {name: {} for name in ablation.variants}
    for trial in sorted(results, key=lambda trial: (trial.rate, trial.seed)):
        by_variant[trial.variant].setdefault(trial.rate, {})[trial.seed] = results[trial]
    return {name: VariantResult(by_rate) for name, by_rate in by_variant.items()}


def loss_differences(runs: Runs, baseline_runs: Runs) -> list[float]:
    """Return held-out loss minus the baseline's, for each seed at which neither diverged."""
    pairs = [(run.loss, baseline_runs[seed].loss) for seed, run in runs.items() if seed in baseline_runs]
    return [loss - baseline for loss, baseline in pairs if loss is not None and baseline is not None]


def curve_differences(runs: Runs, baseline_runs: Runs) -> list[tuple[list[float], list[float]]]:
    """Return (tokens, training loss minus the baseline's on the same batches) for each seed that both trained."""
    curves: list[tuple[list[float], list[float]]] = []
    for seed, run in runs.items():
        baseline_curve = baseline_runs[seed].curve if seed in baseline_runs else []
        tokens = [count for count, _ in run.curve]
        if (
            tokens
            and tokens == [count for count, _ in baseline_curve]
            and tokens == (curves[0][0] if curves else tokens)
        ):
            differences = [loss - baseline for (_, loss), (_, baseline) in zip(run.curve, baseline_curve, strict=True)]
            curves.append((tokens, differences))
    return curves
