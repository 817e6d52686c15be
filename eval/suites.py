"""Suites of benchmarks as data: tasks of lm-evaluation-harness, with the shots and the scores of the paper.

Scores and shots are those of Moonlight's paper (arXiv 2502.16982). It states no shots for HumanEval, MBPP, MATH and
CMath; those here are the usual ones.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from moonlight.errors import UserError

OWN = "own"
"""Where the tasks lie that the harness lacks, or runs without a sandbox: `eval/tasks/`."""

COLUMNS = ("Llama3.2-3B", "Qwen2.5-3B", "DeepSeek-V2-Lite", "Moonlight")
"""Models whose scores the paper publishes."""

HELD_OUT = "heldout"
"""The suite that has no tasks: bits per byte of prepared data."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One row of a suite's table."""

    name: str
    """On the command line and in files."""
    title: str
    task: str
    """Task or group of the harness."""
    places: tuple[str, ...]
    """Folders of the harness's tasks that hold it and all that it includes, or OWN."""
    shots: int
    metric: str
    """Metric and filter, as the harness names a result."""
    runs_code: bool = False
    higher_is_better: bool = True
    stated: bool = True
    """Whether the shots are the paper's."""
    published: dict[str, float] = field(default_factory=dict)
    """Score by model, in percent."""


def _paper(*scores: float | None) -> dict[str, float]:
    return {name: score for name, score in zip(COLUMNS, scores, strict=True) if score is not None}


PAPER = (
    Benchmark(
        name="mmlu",
        title="MMLU",
        task="mmlu",
        places=("mmlu/default",),
        shots=5,
        metric="acc,none",
        published=_paper(54.7, 65.6, 58.3, 70.0),
    ),
    Benchmark(
        name="mmlu-pro",
        title="MMLU-pro",
        task="mmlu_pro",
        places=("mmlu_pro",),
        shots=5,
        metric="exact_match,custom-extract",
        published=_paper(25.0, 34.6, 25.5, 42.4),
    ),
    Benchmark(
        name="bbh",
        title="BBH",
        task="bbh",
        places=("bbh/cot_fewshot",),
        shots=3,
        metric="exact_match,get-answer",
        published=_paper(46.8, 56.3, 44.1, 65.2),
    ),
    Benchmark(
        name="triviaqa",
        title="TriviaQA",
        task="triviaqa",
        places=("triviaqa",),
        shots=5,
        metric="exact_match,remove_whitespace",
        published=_paper(59.6, 51.1, 65.1, 66.3),
    ),
    Benchmark(
        name="humaneval",
        title="HumanEval",
        task="sandboxed_humaneval",
        places=(OWN,),
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
        places=(OWN,),
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
        places=("gsm8k",),
        shots=4,
        metric="exact_match,strict-match",
        published=_paper(34.0, 79.1, 41.1, 77.4),
    ),
    Benchmark(
        name="math",
        title="MATH",
        task="minerva_math",
        places=("minerva_math", "benchmarks"),
        shots=4,
        metric="math_verify,none",
        stated=False,
        published=_paper(8.5, 42.6, 17.1, 45.3),
    ),
    Benchmark(
        name="cmath",
        title="CMath",
        task="cmath",
        places=(OWN,),
        shots=3,
        metric="exact_match,none",
        stated=False,
        published=_paper(None, 80.0, 58.4, 81.1),
    ),
    Benchmark(
        name="ceval",
        title="C-Eval",
        task="ceval-valid",
        places=("ceval",),
        shots=5,
        metric="acc,none",
        published=_paper(None, 75.0, 60.3, 77.2),
    ),
    Benchmark(
        name="cmmlu",
        title="CMMLU",
        task="cmmlu",
        places=("cmmlu",),
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
        places=(OWN,),
        shots=0,
        metric="acc,none",
    ),
    Benchmark(
        name="recall",
        title="exact match",
        task="offline_recall",
        places=(OWN,),
        shots=3,
        metric="exact_match,none",
    ),
    Benchmark(
        name="code",
        title="code",
        task="offline_code",
        places=(OWN,),
        shots=0,
        metric="pass@1,none",
        runs_code=True,
    ),
    Benchmark(
        name="text",
        title="text, bits per byte",
        task="offline_text",
        places=(OWN,),
        shots=0,
        metric="bits_per_byte,none",
        higher_is_better=False,
    ),
)

SUITES: dict[str, tuple[Benchmark, ...]] = {"paper": PAPER, "offline": OFFLINE, HELD_OUT: ()}


def select_benchmarks(suite: str, names: Sequence[str]) -> tuple[Benchmark, ...]:
    """The benchmarks of a suite, in its order; all of them if `names` is empty.

    Raises:
        UserError: an unknown suite or benchmark; the nearest name is suggested.
    """
    if suite not in SUITES:
        raise UserError(f"--suite is {suite!r}: {_accepted(suite, SUITES)}")
    known = {benchmark.name: benchmark for benchmark in SUITES[suite]}
    for name in names:
        if name not in known:
            if suite == HELD_OUT:
                raise UserError(f"--tasks has {name!r}: the suite {HELD_OUT} has no tasks, give --data")
            elsewhere = [other for other, those in SUITES.items() if name in {one.name for one in those}]
            if elsewhere:
                place, accepted = f"which is in --suite {elsewhere[0]}", ", ".join(known)
                raise UserError(f"--tasks has {name!r}, {place}: accepted in {suite} are {accepted}")
            raise UserError(f"--tasks has {name!r}: {_accepted(name, known)}")
    return tuple(benchmark for name, benchmark in known.items() if not names or name in names)


def _accepted(name: str, names: Iterable[str]) -> str:
    """What would be accepted, the nearest first."""
    names = list(names)
    titles = {one.replace("-", "").replace("_", ""): one for one in names}
    plain = name.lower().replace("-", "").replace("_", "")
    near = difflib.get_close_matches(plain, titles, n=1, cutoff=0.5)
    hint = f"did you mean {titles[near[0]]}? " if near else ""
    return f"{hint}{'A' if hint else 'a'}ccepted are {', '.join(names)}"
