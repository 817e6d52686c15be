"""A scaling ladder: model sizes that both optimizers train over one grid of learning rates, and its pending runs."""

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
"""Sizes that a fit of two parameters and its interval need."""


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
    """A scaling ladder, as read from a file of `configs/scaling/`."""

    kind, part, point_type = "ladder", "size", LadderRun
    run_keys = frozenset({"name", "optimizer.name", "schedule.lr", "train.seed"})

    rates: tuple[float, ...]
    """Initial learning rates of both optimizers at every size."""
    sizes: dict[str, dict[str, Any]]
    """Settings of each size."""
    factor: float = 2.0
    """Ratio of neighboring learning rates."""
    most_rates: int = 9
    """Maximum number of learning rates of one size."""
    seeds: tuple[int, ...] = (1, 2)
    """The grid uses the first seed. Each optimizer's best rate is trained with all seeds."""
    folder: str = "runs/scaling"

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        return self.sizes

    def representative_run(self, group: str) -> LadderRun:
        return LadderRun(group, OPTIMIZERS[0], self.rates[0], self.seeds[0])

    def run_settings(self, point: LadderRun) -> dict[str, Any]:
        return {"optimizer.name": point.optimizer, "schedule.lr": f"{point.rate:g}"}

    def check(self) -> None:
        for key, is_valid in (("factor", self.factor > 1), ("most_rates", self.most_rates >= len(self.rates))):
            if not is_valid:
                expected = "above 1" if key == "factor" else f"at least {len(self.rates)}, the number of rates"
                raise UserError(f"ladder {self.path}: {key} is {getattr(self, key)}: it must be {expected}")

    def pending_runs(self, losses: Mapping[LadderRun, float]) -> list[LadderRun]:
        """Return the pending runs of each size: first its grid, then the other seeds at each optimizer's best rate.

        The grid grows equally for both optimizers until neither is best at an edge.
        """
        pending: list[LadderRun] = []
        for size in self.sizes:
            values = losses_at(self, size, losses)
            rates = pending_rates(self.rates, self.factor, self.most_rates, values)
            grid = [LadderRun(size, name, rate, self.seeds[0]) for rate in rates for name in OPTIMIZERS]
            if missing := [point for point in grid if point not in losses]:
                pending += missing
                continue
            for name in OPTIMIZERS:
                best = best_rate(values[name])
                if math.isfinite(values[name][best]):
                    other_seeds = [LadderRun(size, name, best, seed) for seed in self.seeds[1:]]
                    pending += [point for point in other_seeds if point not in losses]
        return pending

    def runs_to_keep(self, losses: Mapping[LadderRun, float]) -> set[LadderRun]:
        return set(best_points(self, losses).values())


def load_ladder(path: Path) -> Ladder:
    """Read a ladder and check the recipe of each size. Raises the errors of `load_study`."""
    return load_study(Ladder, path)


def losses_at(ladder: Ladder, size: str, losses: Mapping[LadderRun, float]) -> dict[str, dict[float, float]]:
    """Return the loss of one size by optimizer and learning rate, for the grid's seed; infinite if a run diverged."""
    by_optimizer: dict[str, dict[float, float]] = {name: {} for name in OPTIMIZERS}
    for point, loss in losses.items():
        if point.size == size and point.seed == ladder.seeds[0]:
            by_optimizer[point.optimizer][point.rate] = loss
    return by_optimizer


def best_points(ladder: Ladder, losses: Mapping[LadderRun, float]) -> dict[tuple[str, str], LadderRun]:
    """Return the run with the smallest loss so far by (size, optimizer), for the grid's seed.

    The result omits a size and optimizer if all of its runs diverged.
    """
    best_runs = {}
    for size in ladder.sizes:
        for name, values in losses_at(ladder, size, losses).items():
            if values and math.isfinite(values[best := best_rate(values)]):
                best_runs[size, name] = LadderRun(size, name, best, ladder.seeds[0])
    return best_runs
