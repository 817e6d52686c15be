"""What every benchmark prints and keeps: figures, ours and a peer's, each with its rounds and its bar."""

import importlib.metadata
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
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
"""What a benchmark may call, besides torch, and the module that it is imported as."""
ALWAYS_NAMED = ("megatron-core", "transformers")


@dataclass(frozen=True)
class BenchResult:
    """One line of the report."""

    case: str
    unit: str
    ours: float
    peer: float
    ratio: float
    spread: str
    bar: str
    passed: bool
    weights_apart: float | None = None
    """Distance of the peer's weights from ours after all rounds, over the distance gone."""
    ours_rounds: tuple[float, ...] = ()
    peer_rounds: tuple[float, ...] = ()
    ratio_rounds: tuple[float, ...] = ()
    """Of every round; empty where there was one measurement."""
    aim: float | None = None
    """What the ratio is hoped to reach; the bar is what it must."""
    own_limit: bool = False
    """Whether the place of the peer is taken by a limit of ours, or by another way of ours."""

    def as_json(self) -> dict[str, Any]:
        """All of it, with median and extremes of the rounds."""
        content: dict[str, Any] = {"case": self.case, "unit": self.unit}
        for name in ("ours", "peer", "ratio"):
            middle = getattr(self, name)
            rounds = list(getattr(self, f"{name}_rounds")) or [middle]
            content[name] = {"median": middle, "minimum": min(rounds), "maximum": max(rounds), "rounds": rounds}
        content |= {"bar": self.bar, "aim": self.aim, "passed": self.passed, "own_limit": self.own_limit}
        return content if self.weights_apart is None else content | {"weights_apart": self.weights_apart}


@dataclass(frozen=True)
class BenchMachine:
    """What a benchmark ran on."""

    hardware: str
    cores: int
    threads: int
    torch: str

    def __str__(self) -> str:
        on = f"{self.hardware}, {self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{on}, torch {self.torch}, {datetime.now(UTC):%Y-%m-%d}"


def time_ratio(
    case: str,
    ours: list[float],
    peer: list[float],
    bar: float,
    gate: bool,
    unit: str = "ms",
    aim: float | None = None,
) -> BenchResult:
    """Times of all rounds as one figure: the ratio of the medians, the peer's over ours; more is better."""
    ratios = tuple(theirs / own for own, theirs in zip(ours, peer, strict=True))
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
    """Times of all rounds beside the most that they may be, which takes the place of a peer."""
    return replace(time_ratio(case, ours, [bar] * len(ours), 1.0, gate, unit, bar / aim), own_limit=True)


def told_rounds(rounds: int, warms_up: bool = True) -> Iterator[int]:
    """0 to `rounds`, 0 to warm up, or 1 to `rounds`; standard error is told which, because some take minutes."""
    for number in range(0 if warms_up else 1, rounds + 1):
        print(f"round {number} of {rounds}" if number else "warming up", file=sys.stderr, flush=True)
        yield number


def hardware(device: str) -> BenchMachine:
    """Processor or GPU, the cores and threads that this process has, and its torch."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [line.split(":")[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    if device == "cuda":
        model = f"{torch.cuda.get_device_name()}, {model}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return BenchMachine(model, cores, torch.get_num_threads(), torch.__version__)


def print_results(
    title: str,
    figures: Sequence[BenchResult],
    machine: BenchMachine,
    notes: Sequence[str] = (),
    json_path: Path | None = None,
) -> bool:
    """Print the table with `notes` below it, write it as JSON too if asked, and return whether every bar was met."""
    table = Table(title=title, caption=str(machine))
    for name in ("case", "ours", "peer", "ratio", "spread", "bar", "aim", "gate"):
        table.add_column(name, no_wrap=True, justify="left" if name == "case" else "right")
    for figure in figures:
        digits = 1 if figure.unit == "ms" else 2 if figure.unit else 5
        numbers = [f"{value:.{digits}f} {figure.unit}".strip() for value in (figure.ours, figure.peer)]
        gate = "passed" if figure.passed else "FAILED"
        aim = "" if figure.aim is None else f"{figure.aim:.3g}"
        table.add_row(figure.case, *numbers, f"{figure.ratio:.2f}", figure.spread, figure.bar, aim, gate)
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
            "figures": [figure.as_json() for figure in figures],
            "notes": list(notes),
        }
        make_folder(json_path.parent)
        write_json(json_path, content)
    return all(figure.passed for figure in figures)


def _versions() -> dict[str, str]:
    """Of the libraries that are always named, and of those that this process has imported."""
    used = [name for name, module in LIBRARIES.items() if name in ALWAYS_NAMED or module in sys.modules]
    return {name: importlib.metadata.version(name) for name in used}
