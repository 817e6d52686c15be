"""Suites of benchmarks: tasks of lm-evaluation-harness, with numbers of shots and published scores.

Shots and scores are from the Moonlight paper (arXiv 2502.16982). It does not state shots for HumanEval, MBPP, MATH and
CMath; the standard numbers are used there.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from moonlight.errors import UserError

LOCAL_TASKS = "own"
"""Stands for `eval/tasks/`: tasks that the harness lacks, or runs without a sandbox."""

COLUMNS = ("Llama3.2-3B", "Qwen2.5-3B", "DeepSeek-V2-Lite", "Moonlight")
"""Models with scores in the paper."""

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


def _paper(*scores: float | None) -> dict[str, float]:
    """Return published scores by model, in the order of COLUMNS; None means not published."""
    return {name: score for name, score in zip(COLUMNS, scores, strict=True) if score is not None}


PAPER = (
    Benchmark(
        name="mmlu",
        title="MMLU",
        task="mmlu",
        task_folders=("mmlu/default",),
        shots=5,
        metric="acc,none",
        published=_paper(54.7, 65.6, 58.3, 70.0),
    ),
    Benchmark(
        name="mmlu-pro",
        title="MMLU-pro",
        task="mmlu_pro",
        task_folders=("mmlu_pro",),
        shots=5,
        metric="exact_match,custom-extract",
        published=_paper(25.0, 34.6, 25.5, 42.4),
    ),
    Benchmark(
        name="bbh",
        title="BBH",
        task="bbh",
        task_folders=("bbh/cot_fewshot",),
        shots=3,
        metric="exact_match,get-answer",
        published=_paper(46.8, 56.3, 44.1, 65.2),
    ),
    Benchmark(
        name="triviaqa",
        title="TriviaQA",
        task="triviaqa",
        task_folders=("triviaqa",),
        shots=5,
        metric="exact_match,remove_whitespace",
        published=_paper(59.6, 51.1, 65.1, 66.3),
    ),
    Benchmark(
        name="humaneval",
        title="HumanEval",
        task="sandboxed_humaneval",
        task_folders=(LOCAL_TASKS,),
        shots=0,
        metric="pass@1,none",
        runs_code=True,
        stated=False,
        published=_paper(28.0, 42.1, 29.9, 48.1),
    ),
    Benchmark(
        name="mbpp",
        title="MBPP",
        task="sandboxed_mbpp",
        task_folders=(LOCAL_TASKS,),
        shots=3,
        metric="pass@1,none",
        runs_code=True,
        stated=False,
        published=_paper(48.7, 57.1, 43.2, 63.8),
    ),
    Benchmark(
        name="gsm8k",
        title="GSM8K",
        task="gsm8k",
        task_folders=("gsm8k",),
        shots=4,
        metric="exact_match,strict-match",
        published=_paper(34.0, 79.1, 41.1, 77.4),
    ),
    Benchmark(
        name="math",
        title="MATH",
        task="minerva_math",
        task_folders=("minerva_math", "benchmarks"),
        shots=4,
        metric="math_verify,none",
        stated=False,
        published=_paper(8.5, 42.6, 17.1, 45.3),
    ),
    Benchmark(
        name="cmath",
        title="CMath",
        task="cmath",
        task_folders=(LOCAL_TASKS,),
        shots=3,
        metric="exact_match,none",
        stated=False,
        published=_paper(None, 80.0, 58.4, 81.1),
    ),
    Benchmark(
        name="ceval",
        title="C-Eval",
        task="ceval-valid",
        task_folders=("ceval",),
        shots=5,
        metric="acc,none",
        published=_paper(None, 75.0, 60.3, 77.2),
    ),
    Benchmark(
        name="cmmlu",
        title="CMMLU",
        task="cmmlu",
        task_folders=("cmmlu",),
        shots=5,
        metric="acc,none",
        published=_paper(None, 75.0, 64.3, 78.2),
    ),
)

OFFLINE = (
    Benchmark(
        name="choice",
        title="multiple choice",
        task="offline_choice",
        task_folders=(LOCAL_TASKS,),
        shots=0,
        metric="acc,none",
    ),
    Benchmark(
        name="recall",
        title="exact match",
        task="offline_recall",
        task_folders=(LOCAL_TASKS,),
        shots=3,
        metric="exact_match,none",
    ),
    Benchmark(
        name="code",
        title="code",
        task="offline_code",
        task_folders=(LOCAL_TASKS,),
        shots=0,
        metric="pass@1,none",
        runs_code=True,
    ),
    Benchmark(
        name="text",
        title="text, bits per byte",
        task="offline_text",
        task_folders=(LOCAL_TASKS,),
        shots=0,
        metric="bits_per_byte,none",
        higher_is_better=False,
    ),
)

SUITES: dict[str, tuple[Benchmark, ...]] = {"paper": PAPER, "offline": OFFLINE, HELD_OUT: ()}


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


def _accepted(name: str, names: Iterable[str]) -> str:
    """Return the accepted names as text, with the nearest name as a hint."""
    names = list(names)
    plain_names = {other.replace("-", "").replace("_", ""): other for other in names}
    plain = name.lower().replace("-", "").replace("_", "")
    near = difflib.get_close_matches(plain, plain_names, n=1, cutoff=0.5)
    hint = f"did you mean {plain_names[near[0]]}? " if near else ""
    return f"{hint}{'A' if hint else 'a'}ccepted are {', '.join(names)}"
