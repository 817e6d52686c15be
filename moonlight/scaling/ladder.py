"""A ladder: sizes, each trained by both optimizers over one grid of learning rates; which runs it still lacks."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moonlight.config import Run
from moonlight.config_io import load_recipe
from moonlight.errors import UserError
from moonlight.flops import train_flops_per_token
from moonlight.scaling.grid import best_rate, wanted_rates
from moonlight.timeline import Timeline

OPTIMIZERS = ("muon", "adamw")
LEAST_SIZES = 3
"""That a fit of two numbers and its interval need."""
STANDARD_LIBRARY = "python"

_REQUIRED = ("name", "recipe", "rates", "sizes")


@dataclass(frozen=True)
class Point:
    """One run of a ladder."""

    size: str
    optimizer: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.size}-{self.optimizer}-lr{self.rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class Ladder:
    """A file of `configs/scaling/`."""

    path: Path
    name: str
    recipe: str
    """A recipe of `moonlight pretrain`, relative to this file."""
    rates: tuple[float, ...]
    """Learning rates that both optimizers begin with at every size."""
    sizes: dict[str, dict[str, Any]]
    """Settings of each size, by their names in the recipe (model.hidden_size, train.train_steps, ...)."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings that all sizes share, laid over the recipe."""
    factor: float = 2.0
    """Between neighbouring learning rates."""
    most_rates: int = 9
    """How wide the grid of one size may grow."""
    seeds: tuple[int, ...] = (1, 2)
    """The first is that of the grid; all are run at each optimizer's best rate."""
    side_by_side: int = 0
    """Runs at a time; 0: as many as the machine has cores for."""
    needs_gpu: bool = False
    """Refuse a machine without one, on which the ladder would not end."""
    corpus: str = ""
    """Text that tokenizer and data are made of if they are missing: a path, or "python" for the standard library's
    sources. Empty: data.path and data.tokenizer must be there."""
    validation_share: float = 0.05
    folder: str = "runs/scaling"

    @property
    def home(self) -> Path:
        """Where everything of the ladder lies."""
        return Path(self.folder) / self.name

    def overrides(self, point: Point) -> list[str]:
        """What turns the recipe into the run of a point: arguments of `moonlight pretrain`."""
        own = {
            "name": point.name,
            "runs_folder": str(self.home / "points"),
            "optimizer.name": point.optimizer,
            "schedule.lr": f"{point.rate:g}",
            "train.seed": point.seed,
        }
        return [f"{key}={_plain(value)}" for key, value in (self.settings | self.sizes[point.size] | own).items()]

    @property
    def recipe_path(self) -> Path:
        return self.path.parent / self.recipe

    def run(self, point: Point) -> Run:
        """The recipe of a point, checked."""
        return load_recipe(self.recipe_path, self.overrides(point))

    def first_point(self, size: str) -> Point:
        """One that stands for its size: all others differ in optimizer, rate and seed alone."""
        return Point(size, OPTIMIZERS[0], self.rates[0], self.seeds[0])


def train_flops(run: Run) -> float:
    """Of the model over the whole run, without the optimizer: what the law is a law of."""
    timeline = Timeline(run)
    return (
        train_flops_per_token(run.model, run.data.sequence_length) * timeline.num_sequences * run.data.sequence_length
    )


def load_ladder(path: Path) -> Ladder:
    """Read a ladder and check the recipe of each of its sizes.

    Raises:
        UserError: it is no such file, a key or value cannot be used, or two sizes are the same run.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"ladder {path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(tree, dict):
        raise UserError(f"ladder {path}: the top level must be a mapping with keys such as {', '.join(_REQUIRED)}")
    known = {field.name for field in dataclasses.fields(Ladder)} - {"path"}
    for key in tree:
        if key not in known:
            raise UserError(f"ladder {path}: unknown key {key!r}; accepted are {', '.join(sorted(known))}")
    for key in _REQUIRED:
        if not tree.get(key):
            raise UserError(f"ladder {path}: {key} is missing; there must be {', '.join(_REQUIRED)}")
    ladder = Ladder(path=path, **{key: _checked(path, key, value) for key, value in tree.items()})
    if "/" in ladder.name or ladder.name in (".", ".."):
        raise UserError(f"ladder {path}: name is {ladder.name!r}: it must be one folder name")
    for key, good in (("factor", ladder.factor > 1), ("most_rates", ladder.most_rates >= len(ladder.rates))):
        if not good:
            least = "above 1" if key == "factor" else f"at least the {len(ladder.rates)} of rates"
            raise UserError(f"ladder {path}: {key} is {getattr(ladder, key)}: it must be {least}")
    if not 0 < ladder.validation_share < 1:
        raise UserError(f"ladder {path}: validation_share is {ladder.validation_share}: it must be between 0 and 1")
    for size in ladder.sizes:
        run = ladder.run(ladder.first_point(size))
        if run.stages:
            raise UserError(f"ladder {path}: recipe {ladder.recipe} has stages: a ladder needs one with a schedule")
        if run.model.vocab_size < 2:
            raise UserError(f"ladder {path}, size {size}: model.vocab_size must be at least 2")
    return ladder


def _checked(path: Path, key: str, value: Any) -> Any:
    """The value of one key in its type."""

    def wrong(expected: str) -> UserError:
        return UserError(f"ladder {path}: {key} is {value!r}: it must be {expected}")

    if key in ("rates", "seeds"):
        number = (int,) if key == "seeds" else (int, float)
        what = "different integers of at least 0" if key == "seeds" else "different numbers above 0"
        if not isinstance(value, list) or not value or len(set(map(str, value))) < len(value):
            raise wrong(f"a list of {what}")
        for one in value:
            good = isinstance(one, number) and not isinstance(one, bool) and math.isfinite(one)
            if not good or one < 0 or (key == "rates" and one == 0):
                raise wrong(f"a list of {what}")
        return tuple(value)
    if key in ("sizes", "settings"):
        inner = value.values() if key == "sizes" and isinstance(value, dict) else [value]
        if not isinstance(value, dict) or not all(isinstance(one, dict) for one in inner):
            raise wrong("a mapping of settings" + (" for each size" if key == "sizes" else ""))
        return {str(name): one for name, one in value.items()}
    if key in ("most_rates", "side_by_side"):
        if type(value) is not int or value < 0:
            raise wrong("an integer of at least 0")
    elif key in ("factor", "validation_share"):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise wrong("a number")
    elif key == "needs_gpu":
        if not isinstance(value, bool):
            raise wrong("true or false")
    elif not isinstance(value, str):
        raise wrong("text")
    return value


def _plain(value: Any) -> str:
    """A YAML value as an override writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def losses_at(ladder: Ladder, size: str, losses: Mapping[Point, float]) -> dict[str, dict[float, float]]:
    """Loss by optimizer and learning rate of one size, for the seed of the grid; infinite where a run diverged."""
    found: dict[str, dict[float, float]] = {name: {} for name in OPTIMIZERS}
    for point, loss in losses.items():
        if point.size == size and point.seed == ladder.seeds[0]:
            found[point.optimizer][point.rate] = loss
    return found


def best_points(ladder: Ladder, losses: Mapping[Point, float]) -> dict[tuple[str, str], Point]:
    """By size and optimizer, the run of the grid's seed with the least loss so far, if one has not diverged."""
    found = {}
    for size in ladder.sizes:
        for name, values in losses_at(ladder, size, losses).items():
            if values and math.isfinite(values[best := best_rate(values)]):
                found[size, name] = Point(size, name, best, ladder.seeds[0])
    return found


def wanted(ladder: Ladder, losses: Mapping[Point, float]) -> list[Point]:
    """The runs that are still to be done, as far as `losses` of those that are done tell; none: the ladder is done.

    The grid of a size comes first, and grows equally for both optimizers until neither is best at its edge; then come
    the other seeds at each one's best rate. The answer depends on `losses` alone, so a ladder that was interrupted
    goes on with the very runs that it would have done.
    """
    missing: list[Point] = []
    for size in ladder.sizes:
        values = losses_at(ladder, size, losses)
        rates = wanted_rates(ladder.rates, ladder.factor, ladder.most_rates, values)
        grid = [Point(size, name, rate, ladder.seeds[0]) for rate in rates for name in OPTIMIZERS]
        if lacking := [point for point in grid if point not in losses]:
            missing += lacking
            continue
        for name in OPTIMIZERS:
            best = best_rate(values[name])
            if math.isfinite(values[name][best]):
                again = [Point(size, name, best, seed) for seed in ladder.seeds[1:]]
                missing += [point for point in again if point not in losses]
    return missing


def flops_of(ladder: Ladder, points: Sequence[Point]) -> float:
    """Of all `points` together."""
    counts = Counter(point.size for point in points)
    return sum(count * train_flops(ladder.run(ladder.first_point(size))) for size, count in counts.items())
