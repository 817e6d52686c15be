"""Suites of benchmarks: tasks of lm-evaluation-harness, with numbers of shots and published scores.

Shots and scores are from the Moonlight paper (arXiv 2502.16982). It does not state shots for HumanEval, MBPP, MATH and
CMath; the standard numbers are used there.
"""

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from importlib.resources import files

import yaml

from moonlight.errors import UserError

LOCAL_TASKS = "own"
"""Stands for `eval/tasks/`: tasks that the harness lacks, or runs without a sandbox."""

HELD_OUT = "heldout"
"""The suite without tasks: bits per byte of prepared data."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark of a suite, one row of its table."""

    name: str
    """Name on the command line and in files."""
    title: str
    task: str
    """Task or group of the harness."""
    task_folders: tuple[str, ...]
    """Folders of the harness with the task and everything it includes, or LOCAL_TASKS."""
    shots: int
    metric: str
    """Key of the result in the harness: metric and filter."""
    runs_code: bool = False
    higher_is_better: bool = True
    stated: bool = True
    """True if the paper states the shots."""
    published: dict[str, float] = field(default_factory=dict)
    """Published score by model, in percent."""


def _load_suites() -> tuple[tuple[str, ...], dict[str, tuple[Benchmark, ...]]]:
    """Return the models with scores in the paper, and the suites, both from suites.yaml."""
    content = yaml.safe_load(files("eval").joinpath("suites.yaml").read_text(encoding="utf-8"))
    suites: dict[str, tuple[Benchmark, ...]] = {}
    for suite, rows in content["suites"].items():
        for row in rows:
            row["task_folders"] = tuple(row["task_folders"])
            scores = zip(content["columns"], row.pop("published", ()), strict=False)
            row["published"] = {model: score for model, score in scores if score is not None}
        suites[suite] = tuple(Benchmark(**row) for row in rows)
    return tuple(content["columns"]), suites | {HELD_OUT: ()}


COLUMNS, SUITES = _load_suites()
"""Models with scores in the paper; benchmarks by suite."""


def select_benchmarks(suite: str, names: Sequence[str]) -> tuple[Benchmark, ...]:
    """Return the benchmarks `names` of a suite, in the order of the suite; all if `names` is empty.

    Raises:
        UserError: an unknown suite or benchmark; the nearest name is suggested.
    """
    if suite not in SUITES:
        raise UserError(f"--suite is {suite!r}: {_accepted(suite, SUITES)}")
    by_name = {benchmark.name: benchmark for benchmark in SUITES[suite]}
    for name in names:
        if name not in by_name:
            if suite == HELD_OUT:
                raise UserError(f"--tasks has {name!r}: the suite {HELD_OUT} has no tasks, give --data")
            suites = [other for other, benchmarks in SUITES.items() if name in {entry.name for entry in benchmarks}]
            if suites:
                hint, accepted = f"which is in --suite {suites[0]}", ", ".join(by_name)
                raise UserError(f"--tasks has {name!r}, {hint}: accepted in {suite} are {accepted}")
            raise UserError(f"--tasks has {name!r}: {_accepted(name, by_name)}")
    return tuple(benchmark for name, benchmark in by_name.items() if not names or name in names)


def _accepted(name: str, names: Collection[str]) -> str:
    """Return the accepted names as text, with the nearest name as a hint."""
    plain_names = {other.replace("-", "").replace("_", ""): other for other in names}
    plain = name.lower().replace("-", "").replace("_", "")
    near = difflib.get_close_matches(plain, plain_names, n=1, cutoff=0.5)
    hint = f"did you mean {plain_names[near[0]]}? " if near else ""
    return f"{hint}{'A' if hint else 'a'}ccepted are {', '.join(names)}"
