"""Progress of long work: a bar on a terminal, otherwise a line every 10 seconds."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich import progress
from rich.console import Console

SECONDS_BETWEEN_LINES = 10


Item = TypeVar("Item")


def track_progress(items: Sequence[Item], name: str) -> Iterator[Item]:
    """Yield the items and report on stderr how many are done."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from progress.track(items, name, console=console, transient=True)
        return
    started = printed_at = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - printed_at >= SECONDS_BETWEEN_LINES:
            printed_at, left = now, (len(items) - done) * (now - started) / done
            console.print(f"{name}: {done:,} of {len(items):,}, {left:.0f} s left", highlight=False)
        yield item


@contextlib.contextmanager
def byte_progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of bytes done so far; it reports progress on stderr."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            progress.TextColumn(name),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    started = printed_at = time.monotonic()

    def report(done: int) -> None:
        nonlocal printed_at
        now = time.monotonic()
        if now - printed_at >= SECONDS_BETWEEN_LINES:
            printed_at, speed = now, done / (now - started)
            left = (total - done) / max(speed, 1)
            line = f"{done / 1e6:.1f} of {total / 1e6:.1f} MB, {speed / 1e6:.1f} MB/s, {left:.0f} s left"
            console.print(f"{name}: {line}", highlight=False)

    yield report
