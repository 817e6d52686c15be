"""What a run says while it goes on, by its first rank: metrics.jsonl, events.jsonl, TensorBoard, the terminal."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moonlight.config.run import RunConfig
from moonlight.errors import attach_path, user_message
from moonlight.files import make_folder
from moonlight.train.metrics import MetricsWriter, ProgressLine, scalars
from moonlight.train.wandb_log import WandbLogger

EVENTS_FILE = "events.jsonl"


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The objects of a run's events.jsonl; lines that a crash cut off are left out."""
    path = folder / EVENTS_FILE
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


class EventLog:
    """Appends to events.jsonl. Every rank has one; only that of the first rank writes."""

    def __init__(self, folder: Path, *, writes: bool) -> None:
        """Warn if the clock stands before the last event: times in the file are then out of order, nothing else is."""
        self._path, self._writes = folder / EVENTS_FILE, writes
        self._left: list[bytes] = []
        """Lines that the disk did not take yet."""
        before = read_events(folder)[-1:] if writes else []
        if before and before[0].get("time", 0) > time.time():
            print(
                f"warning: the clock of this machine is {before[0]['time'] - time.time():.0f} s before the last event "
                f"of {self._path}: check the clock; training does not depend on it",
                file=sys.stderr,
            )

    def add(self, event: str, step: int, **details: Any) -> None:
        """Append one object: what happened, after which step, the time in seconds since 1970, and details of it.

        Raises:
            OSError: it could not be written; the next call that can will do it.
        """
        if not self._writes:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": event, "step": step} | details)
        self._left.append(line.encode() + b"\n")
        make_folder(self._path.parent)
        with attach_path(self._path), self._path.open("a+b") as file:
            while self._left:
                # A line that a crash or a full disk cut off must not swallow this one.
                end = file.seek(0, os.SEEK_END)
                start = b"\n" if end and (file.seek(end - 1), file.read(1))[1] != b"\n" else b""
                file.write(start + self._left[0])
                file.flush()
                self._left.pop(0)


class RunLogger:
    """Every rank has one, and calls it alike; only that of the first rank writes. Closed when its block is left."""

    def __init__(
        self, folder: Path, config: RunConfig, step: int, total_steps: int, last_step: int, *, writes: bool
    ) -> None:
        """Args:
        folder: of the run.
        step: after which it goes on. What a killed run wrote beyond it is dropped, because those steps are done again.
        last_step: where this process stops, for the time that is left.
        """
        self._folder, self._last_step = folder, last_step
        self._events = EventLog(folder, writes=writes)
        self._metrics = MetricsWriter(folder, step) if writes else None
        self._line = ProgressLine(total_steps, step) if writes else None
        self._step = step
        self._tracking = WandbLogger(folder, config, self._warn) if writes and config.monitor.wandb_project else None
        self._started, self._first_step = time.monotonic(), step
        self._warned = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tracking:
            self._tracking.close(finished=kind is None)
        if self._metrics and self._line:
            self._metrics.close()
            self._line.close()

    def print_line(self, text: str) -> None:
        """Say something that stays on the screen."""
        if self._line:
            self._line.note(text)

    def _warn(self, text: str) -> None:
        self.print_line(f"warning: {text}")
        self.log_event("warning", self._step, text=text)

    def log_event(self, event: str, step: int, **details: Any) -> None:
        """Append to events.jsonl."""
        with self._warning():
            self._events.add(event, step, **details)

    def log_step(self, entry: dict[str, Any]) -> None:
        """Append a step's metrics, and show them."""
        self._step = entry["step"]
        if self._metrics and self._line:
            with self._warning():
                self._metrics.write(entry)
            if self._tracking:
                self._tracking.write(scalars(entry), entry["step"])
            seconds = (time.monotonic() - self._started) / (entry["step"] - self._first_step)
            self._line.update(entry, seconds * (self._last_step - entry["step"]))

    def rollback(self, step: int, spike: int, passed_over_sequences: int) -> None:
        """Drop the metrics after `step`, which the run has gone back to because of one in step `spike`."""
        self.print_line(f"step {spike}: back to step {step}, passing over the data up to the spike")
        self.log_event("rolled back", step, spike=spike, passed_over_sequences=passed_over_sequences)
        if self._metrics:
            self._metrics.close()
            self._metrics = MetricsWriter(self._folder, step)
        self._started, self._first_step = time.monotonic(), step

    def flush(self) -> None:
        """Bring the metrics to the disk; called before a checkpoint that makes these steps final."""
        if self._metrics:
            with self._warning():
                self._metrics.sync()

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        """A disk that takes no more does not end a run: lines are kept until it does, and that is said once."""
        try:
            yield
            self._warned = False
        except OSError as error:
            if not self._warned:
                reason = user_message(error) or error
                self.print_line(f"warning: {reason}; training goes on, and keeps its metrics in memory until then")
            self._warned = True
