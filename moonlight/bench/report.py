"""What every benchmark prints: a table of figures, ours and a peer's, each with its bar."""

import json
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
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


def speed(case: str, ours: list[float], peer: list[float], bar: float, gate: bool, unit: str = "ms") -> Figure:
    """Times of all rounds as one figure: the ratio of the medians, the peer's over ours; more is better."""
    ratios = [theirs / own for own, theirs in zip(ours, peer, strict=True)]
    ratio = statistics.median(peer) / statistics.median(ours)
    spread = f"{min(ratios):.2f}..{max(ratios):.2f}"
    middle = statistics.median(ours), statistics.median(peer)
    return Figure(case, unit, *middle, ratio, spread, f">= {bar:.3g}", gate and ratio >= bar)


def hardware(device: str) -> str:
    """Processor, threads, torch and date, in one line."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [line.split(":")[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    if device == "cuda":
        model = f"{torch.cuda.get_device_name()}, {model}"
    threads = torch.get_num_threads()
    on = f"{model}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{on}, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}"


def report(
    title: str, figures: Sequence[Figure], machine: str, notes: Sequence[str] = (), json_path: Path | None = None
) -> bool:
    """Print the table with `notes` below it, write it as JSON too if asked, and return whether every bar was met."""
    table = Table(title=title, caption=machine)
    for name in ("case", "ours", "peer", "ratio", "spread", "bar", "gate"):
        table.add_column(name, no_wrap=True, justify="left" if name == "case" else "right")
    for figure in figures:
        digits = 1 if figure.unit == "ms" else 2 if figure.unit else 5
        numbers = [f"{value:.{digits}f} {figure.unit}".strip() for value in (figure.ours, figure.peer)]
        gate = "passed" if figure.passed else "FAILED"
        table.add_row(figure.case, *numbers, f"{figure.ratio:.2f}", figure.spread, figure.bar, gate)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)
    if json_path:
        content = {"hardware": machine, "figures": [asdict(figure) for figure in figures]}
        json_path.write_text(json.dumps(content, indent=2) + "\n")
    return all(figure.passed for figure in figures)
