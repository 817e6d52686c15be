"""What each variant of an ablation came to, at its best learning rate and beside the baseline."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from moonlight.studies.ablation import Ablation, AblationRun
from moonlight.studies.grid import best_rate
from moonlight.studies.results import StudyResult

Runs = Mapping[int, StudyResult[AblationRun]]
"""By seed."""


@dataclass(frozen=True)
class VariantResult:
    """All runs of one variant."""

    by_rate: Mapping[float, Runs]
    """Of every learning rate that has been run."""

    def mean(self, rate: float) -> float:
        """Held-out loss over seeds; infinite if one of them diverged."""
        return fmean(math.inf if run.loss is None else run.loss for run in self.by_rate[rate].values())

    @property
    def best(self) -> float | None:
        """The learning rate with the least mean loss, if there is one that no seed diverged at."""
        means = {rate: self.mean(rate) for rate in self.by_rate}
        return best_rate(means) if means and math.isfinite(min(means.values())) else None

    @property
    def runs(self) -> Runs:
        """Those of the best learning rate; empty if there is none."""
        return self.by_rate[self.best] if self.best is not None else {}


def variant_results(
    ablation: Ablation, results: Mapping[AblationRun, StudyResult[AblationRun]]
) -> dict[str, VariantResult]:
    """By variant, in the order of the file."""
    found: dict[str, dict[float, dict[int, StudyResult[AblationRun]]]] = {name: {} for name in ablation.variants}
    for trial in sorted(results, key=lambda trial: (trial.rate, trial.seed)):
        found[trial.variant].setdefault(trial.rate, {})[trial.seed] = results[trial]
    return {name: VariantResult(by_rate) for name, by_rate in found.items()}


def loss_differences(runs: Runs, baseline_runs: Runs) -> list[float]:
    """Held-out loss less the baseline's, of each seed that both ended well with."""
    pairs = [(run.loss, baseline_runs[seed].loss) for seed, run in runs.items() if seed in baseline_runs]
    return [loss - theirs for loss, theirs in pairs if loss is not None and theirs is not None]


def curve_differences(runs: Runs, baseline_runs: Runs) -> list[tuple[list[float], list[float]]]:
    """Tokens, and training loss less the baseline's on the same batches, of each seed that both have."""
    found: list[tuple[list[float], list[float]]] = []
    for seed, run in runs.items():
        other = baseline_runs[seed].curve if seed in baseline_runs else []
        tokens = [at for at, _ in run.curve]
        if tokens and tokens == [at for at, _ in other] and tokens == (found[0][0] if found else tokens):
            found.append((tokens, [loss - theirs for (_, loss), (_, theirs) in zip(run.curve, other, strict=True)]))
    return found
