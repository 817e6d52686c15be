"""What ladders and ablations share: a recipe, settings laid over it, and runs whose results are kept in one file."""

import dataclasses
import math
import typing
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import yaml

from moonlight.config.load import load_recipe
from moonlight.config.run import RunConfig
from moonlight.config.timeline import RunSchedule
from moonlight.errors import UserError
from moonlight.plan.flops import train_flops_per_token

STANDARD_LIBRARY = "python"


class StudyRun(ABC):
    """One run of a study: a frozen dataclass of plain values, which stand in the file of results."""

    seed: int

    @property
    @abstractmethod
    def name(self) -> str:
        """Of its run."""

    @property
    @abstractmethod
    def group(self) -> str:
        """Whose settings it has."""


P = TypeVar("P", bound=StudyRun)


@dataclass(frozen=True, kw_only=True)
class Study(ABC, Generic[P]):
    """A YAML file that says which runs are to be made."""

    kind: ClassVar[str]
    """What messages call it."""
    part: ClassVar[str]
    """What they call one of its groups of points."""
    point_type: ClassVar[type]
    run_keys: ClassVar[frozenset[str]]
    """Settings in which the points of one group differ."""

    path: Path
    name: str
    recipe: str
    """A recipe of `moonlight pretrain`, relative to this file."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings that all groups share, laid over the recipe, by their names there (model.hidden_size, ...)."""
    seeds: tuple[int, ...] = (1, 2)
    side_by_side: int = 0
    """Runs at a time; 0: as many as the machine has cores for."""
    needs_gpu: bool = False
    """Refuse a machine without one, on which it would not end."""
    corpus: str = ""
    """Text that tokenizer and data are made of if they are missing: a path, or "python" for the standard library's
    sources. Empty: data.path and data.tokenizer must be there."""
    validation_share: float = 0.05
    folder: str

    @property
    @abstractmethod
    def groups(self) -> dict[str, dict[str, Any]]:
        """Settings of each group."""

    @abstractmethod
    def representative_run(self, group: str) -> P:
        """One that stands for its group: all others differ in `run_keys` alone."""

    @abstractmethod
    def run_settings(self, point: P) -> dict[str, Any]:
        """Those of a point, besides its group's and its seed."""

    @abstractmethod
    def pending_runs(self, losses: Mapping[P, float]) -> list[P]:
        """The runs that are still to be done, as far as `losses` of those that are done tell (infinite: diverged).

        It depends on `losses` alone, so that a study that was interrupted goes on with the very runs that it would have
        done.
        """

    @abstractmethod
    def runs_to_keep(self, losses: Mapping[P, float]) -> set[P]:
        """The points, of those in `losses`, whose checkpoints are still looked at."""

    def check(self) -> None:
        """Raise UserError for values that do not go together."""

    @property
    def folder_path(self) -> Path:
        """Where everything of the study lies."""
        return Path(self.folder) / self.name

    @property
    def recipe_path(self) -> Path:
        return self.path.parent / self.recipe

    def overrides(self, point: P) -> list[str]:
        """What turns the recipe into the run of a point: arguments of `moonlight pretrain`."""
        own = {"name": point.name, "runs_folder": str(self.folder_path / "points"), "train.seed": point.seed}
        every = self.settings | self.groups[point.group] | self.run_settings(point) | own
        return [f"{key}={_plain(value)}" for key, value in every.items()]

    def make_config(self, point: P) -> RunConfig:
        """The recipe of a point, checked."""
        return load_recipe(self.recipe_path, self.overrides(point))

    def first_run(self) -> RunConfig:
        """The recipe of one point: for what all have in common."""
        return self.make_config(self.representative_run(next(iter(self.groups))))


S = TypeVar("S", bound=Study)


def load_study(cls: type[S], path: Path) -> S:
    """Read a study and check the recipe of each of its groups.

    Raises:
        UserError: it is no such file, a key or value cannot be used, or two groups are the same run.
    """
    study = cls(path=path, **_read(cls, path))
    start = f"{study.kind} {path}"
    if "/" in study.name or study.name in (".", ".."):
        raise UserError(f"{start}: name is {study.name!r}: it must be one folder name")
    if not 0 < study.validation_share < 1:
        raise UserError(f"{start}: validation_share is {study.validation_share}: it must be between 0 and 1")
    study.check()
    runs: dict[str, RunConfig] = {}
    own = sorted(study.run_keys | {"runs_folder"})
    for group, values in study.groups.items():
        if taken := [key for key in own if key in study.settings | values]:
            raise UserError(f"{start}, {study.part} {group}: {taken[0]} is not free: the {study.kind} sets it itself")
        config = dataclasses.replace(study.make_config(study.representative_run(group)), name=study.kind)
        if config.stages:
            raise UserError(f"{start}: recipe {study.recipe} has stages: a {study.kind} needs one with a schedule")
        if config.model.vocab_size < 2:
            raise UserError(f"{start}, {study.part} {group}: model.vocab_size must be at least 2")
        if same := [other for other, theirs in runs.items() if theirs == config]:
            raise UserError(f"{start}: {study.part}s {same[0]} and {group} are the same run")
        runs[group] = config
    return study


def _read(cls: type[Study], path: Path) -> dict[str, Any]:
    """The values of a file by their keys, in their types."""
    start, hints = f"{cls.kind} {path}", typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name != "path"}
    none = dataclasses.MISSING
    required = [key for key, field in fields.items() if field.default is none and field.default_factory is none]
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{start} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{start}: the top level must be a mapping with keys such as {', '.join(required)}")
    for key in tree:
        if key not in fields:
            raise UserError(f"{start}: unknown key {key!r}; accepted are {', '.join(sorted(fields))}")
    for key in required:
        if not tree.get(key):
            raise UserError(f"{start}: {key} is missing; there must be {', '.join(required)}")
    return {key: _checked(f"{start}: {key} is {value!r}", hints[key], value, cls.part) for key, value in tree.items()}


def _checked(start: str, hint: Any, value: Any, part: str) -> Any:
    """The value of one key in its type; numbers are those of learning rates, seeds and counts."""

    def require(accepted: bool, expected: str) -> None:
        if not accepted:
            raise UserError(f"{start}: it must be {expected}")

    if hint is int:
        require(type(value) is int and value >= 0, "an integer of at least 0")
    elif hint is float:
        require(type(value) in (int, float) and math.isfinite(value), "a number")
    elif hint is bool:
        require(isinstance(value, bool), "true or false")
    elif hint is str:
        require(isinstance(value, str), "text")
    elif typing.get_origin(hint) is tuple:
        whole = typing.get_args(hint)[0] is int
        what = f"a list of different {'integers of at least 0' if whole else 'numbers above 0'}"
        require(isinstance(value, list) and bool(value) and len(set(map(str, value))) == len(value), what)
        for one in value:
            number = type(one) is int or (not whole and type(one) is float)
            require(number and math.isfinite(one) and (one >= 0 if whole else one > 0), what)
        return tuple(value)
    else:
        nested = typing.get_origin(typing.get_args(hint)[1]) is dict
        what = "a mapping of settings" + f" for each {part}" * nested
        require(isinstance(value, dict) and all(isinstance(one, dict) or not nested for one in value.values()), what)
        return {str(name): one for name, one in value.items()}
    return value


def _plain(value: Any) -> str:
    """A YAML value as an override writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def train_flops(config: RunConfig) -> float:
    """Of the model over the whole run, without the optimizer: what the law is a law of."""
    timeline = RunSchedule(config)
    return (
        train_flops_per_token(config.model, config.data.sequence_length)
        * timeline.num_sequences
        * config.data.sequence_length
    )


def total_flops(study: Study[P], points: Sequence[P]) -> float:
    """Of all `points` together."""
    counts = Counter(point.group for point in points)
    return sum(
        count * train_flops(study.make_config(study.representative_run(group))) for group, count in counts.items()
    )
