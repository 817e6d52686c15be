"""An ablation: named variants of one recipe, each trained with every learning rate and seed."""

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
    """A file of `configs/ablations/`."""

    kind, part, point_type = "ablation", "variant", AblationRun
    run_keys = frozenset({"name", "schedule.lr", "train.seed"})

    variants: dict[str, dict[str, Any]]
    """Settings of each variant, laid over the recipe and `settings`."""
    baseline: str
    """The variant that the others are compared with."""
    rates: tuple[float, ...]
    """Learning rates of every variant."""
    varied: str = ""
    """A setting that is a number in the variants that have it: the loss is drawn over it."""
    folder: str = "runs/ablations"

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        return self.variants

    @property
    def numbers(self) -> dict[str, float]:
        """The varied number of each variant that has one, rising; empty if nothing is varied."""
        known = {name: values[self.varied] for name, values in self.variants.items() if self.varied in values}
        return dict(sorted(known.items(), key=lambda item: item[1]))

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
        """All variants with the first seed, then with the next."""
        every = [AblationRun(name, rate, seed) for seed in self.seeds for name in self.variants for rate in self.rates]
        return [trial for trial in every if trial not in losses]

    def runs_to_keep(self, losses: Mapping[AblationRun, float]) -> set[AblationRun]:
        """All that ended well: their weights are looked at when all runs have ended."""
        return {trial for trial, loss in losses.items() if math.isfinite(loss)}


def load_ablation(path: Path) -> Ablation:
    """Read an ablation and check the recipe of each of its variants; raises what `load_study` does."""
    return load_study(Ablation, path)
