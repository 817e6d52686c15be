"""Common base of ladders and ablations: a recipe, overrides for each run, and one results file for all runs."""

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
"""Value of `corpus` that selects the sources of Python's standard library."""


class StudyRun(ABC):
    """One run of a study: a frozen dataclass of plain values, whose fields are keys of the results file."""

    seed: int

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the run and of its folder."""

    @property
    @abstractmethod
    def group(self) -> str:
        """Name of the group whose settings the run has."""


P = TypeVar("P", bound=StudyRun)


@dataclass(frozen=True, kw_only=True)
class Study(ABC, Generic[P]):
    """A study, as read from a YAML file. The fields other than `path` are the file's keys."""

    kind: ClassVar[str]
    """Name of the study's type in messages."""
    part: ClassVar[str]
    """Name of a group in messages."""
    point_type: ClassVar[type]
    """Subclass of StudyRun."""
    run_keys: ClassVar[frozenset[str]]
    """Settings that vary between the runs of one group."""

    path: Path
    name: str
    recipe: str
    """Path of a recipe of `moonlight pretrain`, relative to this file."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Overrides of the recipe for all groups, by dotted key (model.hidden_size, ...)."""
    seeds: tuple[int, ...] = (1, 2)
    side_by_side: int = 0
    """Number of simultaneous runs; 0: as many as the machine's cores allow."""
    needs_gpu: bool = False
    """Reject a machine without a GPU, on which the study takes too long."""
    corpus: str = ""
    """Text for tokenizer and data if they are missing: a path, or "python" for the standard library's sources.

    Empty: data.path and data.tokenizer must exist.
    """
    validation_share: float = 0.05
    """Fraction of the documents to hold out when preparing `corpus`."""
    folder: str
    """Parent of the study's folder."""

    @property
    @abstractmethod
    def groups(self) -> dict[str, dict[str, Any]]:
        """Overrides of each group, by the group's name."""

    @abstractmethod
    def representative_run(self, group: str) -> P:
        """Return one run of a group. The group's other runs differ in `run_keys` only."""

    @abstractmethod
    def run_settings(self, point: P) -> dict[str, Any]:
        """Return the overrides of one run, without those of its group and without its seed."""

    @abstractmethod
    def pending_runs(self, losses: Mapping[P, float]) -> list[P]:
        """Return the runs to train next, from the `losses` of finished runs (infinite: diverged).

        The result depends on `losses` only, so an interrupted study resumes with the same runs.
        """

    @abstractmethod
    def runs_to_keep(self, losses: Mapping[P, float]) -> set[P]:
        """Return the finished runs whose checkpoints are still needed."""

    def check(self) -> None:
        """Raise UserError for inconsistent values."""

    @property
    def folder_path(self) -> Path:
        """Folder of all runs, results and plots of the study."""
        return Path(self.folder) / self.name

    @property
    def recipe_path(self) -> Path:
        return self.path.parent / self.recipe

    def overrides(self, point: P) -> list[str]:
        """Return the arguments of `moonlight pretrain` that turn the recipe into one run."""
        fixed = {"name": point.name, "runs_folder": str(self.folder_path / "points"), "train.seed": point.seed}
        settings = self.settings | self.groups[point.group] | self.run_settings(point) | fixed
        return [f"{key}={_override_text(value)}" for key, value in settings.items()]

    def make_config(self, point: P) -> RunConfig:
        """Return the validated configuration of one run."""
        return load_recipe(self.recipe_path, self.overrides(point))

    def first_config(self) -> RunConfig:
        """Return the configuration of one run, for settings that all runs share."""
        return self.make_config(self.representative_run(next(iter(self.groups))))


S = TypeVar("S", bound=Study)


def load_study(cls: type[S], path: Path) -> S:
    """Read a study and check the recipe of each of its groups.

    Raises:
        UserError: the file cannot be read, a key or value is invalid, or two groups are the same run.
    """
    study = cls(path=path, **_read(cls, path))
    start = f"{study.kind} {path}"
    if "/" in study.name or study.name in (".", ".."):
        raise UserError(f"{start}: name is {study.name!r}: it must be one folder name")
    if not 0 < study.validation_share < 1:
        raise UserError(f"{start}: validation_share is {study.validation_share}: it must be between 0 and 1")
    study.check()
    configs: dict[str, RunConfig] = {}
    reserved = sorted(study.run_keys | {"runs_folder"})
    for group, values in study.groups.items():
        if conflicts := [key for key in reserved if key in study.settings | values]:
            raise UserError(
                f"{start}, {study.part} {group}: {conflicts[0]} is not free: the {study.kind} sets it; remove it"
            )
        config = dataclasses.replace(study.make_config(study.representative_run(group)), name=study.kind)
        if config.stages:
            raise UserError(f"{start}: recipe {study.recipe} has stages: a {study.kind} needs a recipe with a schedule")
        if config.model.vocab_size < 2:
            raise UserError(f"{start}, {study.part} {group}: model.vocab_size must be at least 2")
        if same := [other for other, other_config in configs.items() if other_config == config]:
            raise UserError(f"{start}: {study.part}s {same[0]} and {group} are the same run")
        configs[group] = config
    return study


def _read(cls: type[Study], path: Path) -> dict[str, Any]:
    """Return the values of a file by key, converted to the types of the fields."""
    start, hints = f"{cls.kind} {path}", typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name != "path"}
    missing = dataclasses.MISSING
    required = [key for key, field in fields.items() if field.default is missing and field.default_factory is missing]
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
            raise UserError(f"{start}: {key} is missing; the required keys are {', '.join(required)}")
    return {key: _checked(f"{start}: {key} is {value!r}", hints[key], value, cls.part) for key, value in tree.items()}


def _checked(start: str, hint: Any, value: Any, part: str) -> Any:
    """Return the value of one key, converted to the type `hint`. Numbers are learning rates, seeds or counts."""

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
        is_integer = typing.get_args(hint)[0] is int
        expected = f"a list of different {'integers of at least 0' if is_integer else 'numbers above 0'}"
        require(isinstance(value, list) and bool(value) and len(set(map(str, value))) == len(value), expected)
        for item in value:
            is_number = type(item) is int or (not is_integer and type(item) is float)
            require(is_number and math.isfinite(item) and (item >= 0 if is_integer else item > 0), expected)
        return tuple(value)
    else:
        is_nested = typing.get_origin(typing.get_args(hint)[1]) is dict
        expected = "a mapping of settings" + f" for each {part}" * is_nested
        require(
            isinstance(value, dict) and all(isinstance(item, dict) or not is_nested for item in value.values()),
            expected,
        )
        return {str(name): item for name, item in value.items()}
    return value


def _override_text(value: Any) -> str:
    """Format a YAML value for an override."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def train_flops(config: RunConfig) -> float:
    """Return the model's FLOPs over the entire run, without the optimizer: C in the scaling law."""
    timeline = RunSchedule(config)
    return (
        train_flops_per_token(config.model, config.data.sequence_length)
        * timeline.num_sequences
        * config.data.sequence_length
    )


def total_flops(study: Study[P], points: Sequence[P]) -> float:
    """Return the sum of `train_flops` over `points`."""
    counts = Counter(point.group for point in points)
    return sum(
        count * train_flops(study.make_config(study.representative_run(group))) for group, count in counts.items()
    )
