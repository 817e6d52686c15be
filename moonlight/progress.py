"""How far long work on files has come."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich import progress
from rich.console import Console

SECONDS_BETWEEN_LINES = 10


@contextlib.contextmanager
def byte_progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Give a function to tell the bytes done so far: a bar on a terminal, else a line every 10 seconds."""
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
    started = said = time.monotonic()

    def say(done: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= SECONDS_BETWEEN_LINES:
            said, speed = now, done / (now - started)
            left = (total - done) / max(speed, 1)
            line = f"{done / 1e6:.1f} of {total / 1e6:.1f} MB, {speed / 1e6:.1f} MB/s, {left:.0f} s left"
            console.print(f"{name}: {line}", highlight=False)

    yield say
