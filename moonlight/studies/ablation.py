"""An ablation: named variants of a recipe, each trained with every learning rate and seed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moonlight.errors import UserError
from moonlight.studies.study import Study, StudyRun, load_study


@dataclass(frozen=True)
class AblationRun(StudyRun):
    """One run of an ablation."""

    variant: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-lr{self.rate:g}-seed{self.seed}"

    @property
    def group(self) -> str:
        return self.variant


@dataclass(frozen=True, kw_only=True)
class Ablation(Study[AblationRun]):
    """An ablation, as read from a file of `configs/ablations/`."""

    kind, part, point_type = "ablation", "variant", AblationRun
    run_keys = frozenset({"name", "schedule.lr", "train.seed"})

    variants: dict[str, dict[str, Any]]
    """Settings of each variant, which override the recipe and `settings`."""
    baseline: str
    """The variant to compare the others with."""
    rates: tuple[float, ...]
    """Learning rates of every variant."""
    varied: str = ""
    """Key of a numeric setting that at least two variants set. The plot shows the loss over it."""
    folder: str = "runs/ablations"

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        return self.variants

    @property
    def numbers(self) -> dict[str, float]:
        """Value of `varied` for each variant that sets it, in ascending order; empty if nothing is varied."""
        numbers = {name: values[self.varied] for name, values in self.variants.items() if self.varied in values}
        return dict(sorted(numbers.items(), key=lambda item: item[1]))

    def representative_run(self, group: str) -> AblationRun:
        return AblationRun(group, self.rates[0], self.seeds[0])

    def run_settings(self, point: AblationRun) -> dict[str, Any]:
        return {"schedule.lr": f"{point.rate:g}"}

    def check(self) -> None:
        start = f"ablation {self.path}"
        if len(self.variants) < 2:
            raise UserError(f"{start}: variants has {len(self.variants)}: it must have at least 2")
        if self.baseline not in self.variants:
            raise UserError(f"{start}: baseline is {self.baseline!r}: it must be one of {', '.join(self.variants)}")
        values = [settings[self.varied] for settings in self.variants.values() if self.varied in settings]
        if self.varied and (len(values) < 2 or any(type(value) not in (int, float) for value in values)):
            raise UserError(f"{start}: varied is {self.varied!r}: at least 2 variants must set it to a number")

    def pending_runs(self, losses: Mapping[AblationRun, float]) -> list[AblationRun]:
        """Return the pending runs of all variants with the first seed, then with the next."""
        trials = [AblationRun(name, rate, seed) for seed in self.seeds for name in self.variants for rate in self.rates]
        return [trial for trial in trials if trial not in losses]

    def runs_to_keep(self, losses: Mapping[AblationRun, float]) -> set[AblationRun]:
        """Return all runs that did not diverge: `weights.py` reads their checkpoints after the last run."""
        return {trial for trial, loss in losses.items() if math.isfinite(loss)}


def load_ablation(path: Path) -> Ablation:
    """Read an ablation and check the recipe of each variant. Raises the errors of `load_study`."""
    return load_study(Ablation, path)
