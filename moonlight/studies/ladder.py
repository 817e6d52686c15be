"""A ladder: sizes, each trained by both optimizers over one grid of learning rates; which runs it still lacks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moonlight.errors import UserError
from moonlight.studies.grid import best_rate, pending_rates
from moonlight.studies.study import Study, StudyRun, load_study

OPTIMIZERS = ("muon", "adamw")
MIN_SIZES = 3
"""That a fit of two numbers and its interval need."""


@dataclass(frozen=True)
class LadderRun(StudyRun):
    """One run of a ladder."""

    size: str
    optimizer: str
    rate: float
    seed: int

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(self.optimizer)

    @property
    def name(self) -> str:
        return f"{self.size}-{self.optimizer}-lr{self.rate:g}-seed{self.seed}"

    @property
    def group(self) -> str:
        return self.size


@dataclass(frozen=True, kw_only=True)
class Ladder(Study[LadderRun]):
    """A file of `configs/scaling/`."""

    kind, part, point_type = "ladder", "size", LadderRun
    run_keys = frozenset({"name", "optimizer.name", "schedule.lr", "train.seed"})

    rates: tuple[float, ...]
    """Learning rates that both optimizers begin with at every size."""
    sizes: dict[str, dict[str, Any]]
    """Settings of each size."""
    factor: float = 2.0
    """Between neighbouring learning rates."""
    most_rates: int = 9
    """How wide the grid of one size may grow."""
    seeds: tuple[int, ...] = (1, 2)
    """The first is that of the grid; all are run at each optimizer's best rate."""
    folder: str = "runs/scaling"

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        return self.sizes

    def representative_run(self, group: str) -> LadderRun:
        return LadderRun(group, OPTIMIZERS[0], self.rates[0], self.seeds[0])

    def run_settings(self, point: LadderRun) -> dict[str, Any]:
        return {"optimizer.name": point.optimizer, "schedule.lr": f"{point.rate:g}"}

    def check(self) -> None:
        for key, good in (("factor", self.factor > 1), ("most_rates", self.most_rates >= len(self.rates))):
            if not good:
                least = "above 1" if key == "factor" else f"at least the {len(self.rates)} of rates"
                raise UserError(f"ladder {self.path}: {key} is {getattr(self, key)}: it must be {least}")

    def pending_runs(self, losses: Mapping[LadderRun, float]) -> list[LadderRun]:
        """The grid of a size comes first, and grows equally for both optimizers until neither is best at its edge; then
        come the other seeds at each one's best rate."""
        missing: list[LadderRun] = []
        for size in self.sizes:
            values = losses_at(self, size, losses)
            rates = pending_rates(self.rates, self.factor, self.most_rates, values)
            grid = [LadderRun(size, name, rate, self.seeds[0]) for rate in rates for name in OPTIMIZERS]
            if lacking := [point for point in grid if point not in losses]:
                missing += lacking
                continue
            for name in OPTIMIZERS:
                best = best_rate(values[name])
                if math.isfinite(values[name][best]):
                    again = [LadderRun(size, name, best, seed) for seed in self.seeds[1:]]
                    missing += [point for point in again if point not in losses]
        return missing

    def runs_to_keep(self, losses: Mapping[LadderRun, float]) -> set[LadderRun]:
        return set(best_points(self, losses).values())


def load_ladder(path: Path) -> Ladder:
    """Read a ladder and check the recipe of each of its sizes; raises what `load_study` does."""
    return load_study(Ladder, path)


def losses_at(ladder: Ladder, size: str, losses: Mapping[LadderRun, float]) -> dict[str, dict[float, float]]:
    """Loss by optimizer and learning rate of one size, for the seed of the grid; infinite where a run diverged."""
    found: dict[str, dict[float, float]] = {name: {} for name in OPTIMIZERS}
    for point, loss in losses.items():
        if point.size == size and point.seed == ladder.seeds[0]:
            found[point.optimizer][point.rate] = loss
    return found


def best_points(ladder: Ladder, losses: Mapping[LadderRun, float]) -> dict[tuple[str, str], LadderRun]:
    """By size and optimizer, the run of the grid's seed with the least loss so far, if one has not diverged."""
    found = {}
    for size in ladder.sizes:
        for name, values in losses_at(ladder, size, losses).items():
            if values and math.isfinite(values[best := best_rate(values)]):
                found[size, name] = LadderRun(size, name, best, ladder.seeds[0])
    return found
