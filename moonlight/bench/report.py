"""Results of a benchmark, printed as a table and written as JSON: ours and a peer's, with all rounds and a bar."""

import importlib.metadata
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moonlight.files import make_folder, write_json

LIBRARIES = {
    "megatron-core": "megatron",
    "transformers": "transformers",
    "datasets": "datasets",
    "muon-optimizer": "muon",
    "safetensors": "safetensors",
    "sentencepiece": "sentencepiece",
    "tokenizers": "tokenizers",
}
"""Libraries that a benchmark may use in addition to torch: distribution -> module."""
ALWAYS_LISTED = ("megatron-core", "transformers")
"""Libraries whose versions are always recorded; the others only if imported."""


@dataclass(frozen=True)
class BenchResult:
    """Result of one case, a row of the table."""

    case: str
    unit: str
    ours: float
    peer: float
    ratio: float
    spread: str
    bar: str
    passed: bool
    weights_apart: float | None = None
    """Distance of the peer's weights from ours after all rounds, relative to the distance that training moved ours."""
    ours_rounds: tuple[float, ...] = ()
    peer_rounds: tuple[float, ...] = ()
    ratio_rounds: tuple[float, ...] = ()
    """Values of each round, for ours, peer and ratio; empty if there was one measurement."""
    aim: float | None = None
    """Ratio that we hope to reach. The bar is the ratio that the result must reach."""
    own_limit: bool = False
    """True if a limit of ours, or another implementation of ours, replaces the peer."""

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object of the result, with median and range of the rounds."""
        content: dict[str, Any] = {"case": self.case, "unit": self.unit}
        for name in ("ours", "peer", "ratio"):
            median = getattr(self, name)
            rounds = list(getattr(self, f"{name}_rounds")) or [median]
            content[name] = {"median": median, "minimum": min(rounds), "maximum": max(rounds), "rounds": rounds}
        content |= {"bar": self.bar, "aim": self.aim, "passed": self.passed, "own_limit": self.own_limit}
        return content if self.weights_apart is None else content | {"weights_apart": self.weights_apart}


@dataclass(frozen=True)
class BenchMachine:
    """Machine and torch version of a benchmark."""

    hardware: str
    cores: int
    threads: int
    torch: str

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.hardware}, {threads}, torch {self.torch}, {datetime.now(UTC):%Y-%m-%d}"


def time_ratio(
    case: str, ours: list[float], peer: list[float], bar: float, gate: bool, unit: str = "ms", aim: float | None = None
) -> BenchResult:
    """Return the result of the times of all rounds: the ratio of medians, the peer's over ours; larger is better.

    The result passes if `gate` is true and the ratio is at least `bar`.
    """
    ratios = tuple(peer_time / our_time for our_time, peer_time in zip(ours, peer, strict=True))
    ratio = statistics.median(peer) / statistics.median(ours)
    return BenchResult(
        case,
        unit,
        statistics.median(ours),
        statistics.median(peer),
        ratio,
        f"{min(ratios):.2f}..{max(ratios):.2f}",
        f">= {bar:.3g}",
        gate and ratio >= bar,
        ours_rounds=tuple(ours),
        peer_rounds=tuple(peer),
        ratio_rounds=ratios,
        aim=aim,
    )


def against_bar(case: str, ours: list[float], bar: float, gate: bool, unit: str, aim: float) -> BenchResult:
    """Return the result of times compared with the maximum `bar`, which replaces a peer. `aim` is a time as well."""
    return replace(time_ratio(case, ours, [bar] * len(ours), 1.0, gate, unit, bar / aim), own_limit=True)


def iter_rounds(rounds: int, warms_up: bool = True) -> Iterator[int]:
    """Yield 0 (the warm-up round, if `warms_up`), then 1 to `rounds`. Print each to stderr, since some take minutes."""
    for round_index in range(0 if warms_up else 1, rounds + 1):
        print(f"round {round_index} of {rounds}" if round_index else "warming up", file=sys.stderr, flush=True)
        yield round_index


def cpu_seconds(call: Callable[[], object]) -> float:
    """Return the CPU seconds of one call, of all threads of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def hardware(device: str) -> BenchMachine:
    """Return processor or GPU, available cores and threads of this process, and torch's version."""
    model = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        names = [line.split(":")[1].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    if device == "cuda":
        model = f"{torch.cuda.get_device_name()}, {model}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return BenchMachine(model, cores, torch.get_num_threads(), torch.__version__)


def print_results(
    title: str,
    results: Sequence[BenchResult],
    machine: BenchMachine,
    notes: Sequence[str] = (),
    json_path: Path | None = None,
) -> bool:
    """Print the table and `notes`, write them to `json_path` if given, and return whether every result passed."""
    table = Table(title=title, caption=str(machine))
    for name in ("case", "ours", "peer", "ratio", "spread", "bar", "aim", "gate"):
        table.add_column(name, no_wrap=True, justify="left" if name == "case" else "right")
    for result in results:
        digits = 1 if result.unit == "ms" else 2 if result.unit else 5
        numbers = [f"{value:.{digits}f} {result.unit}".strip() for value in (result.ours, result.peer)]
        gate = "passed" if result.passed else "FAILED"
        aim = "" if result.aim is None else f"{result.aim:.3g}"
        table.add_row(result.case, *numbers, f"{result.ratio:.2f}", result.spread, result.bar, aim, gate)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)
    if json_path:
        content = {
            "title": title,
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "command": shlex.join(["moonlight", *sys.argv[1:]]),
            "hardware": machine.hardware,
            "cores": machine.cores,
            "threads": machine.threads,
            "versions": {"python": platform.python_version(), "torch": machine.torch} | _versions(),
            "figures": [result.as_json() for result in results],
            "notes": list(notes),
        }
        make_folder(json_path.parent)
        write_json(json_path, content)
    return all(result.passed for result in results)


def _versions() -> dict[str, str]:
    """Return the versions of ALWAYS_LISTED and of the libraries that this process has imported."""
    used = [name for name, module in LIBRARIES.items() if name in ALWAYS_LISTED or module in sys.modules]
    return {name: importlib.metadata.version(name) for name in used}
