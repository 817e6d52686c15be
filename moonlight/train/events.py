"""The events of a run: events.jsonl, one JSON object a line, appended and never changed. No torch."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from moonlight.errors import attach_path
from moonlight.files import make_folder

EVENTS_FILE = "events.jsonl"


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return the objects of a run's events.jsonl, without lines that a crash truncated."""
    path = folder / EVENTS_FILE
    events = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


class EventLog:
    """Append to events.jsonl. Every rank has one; only the first rank's writes."""

    def __init__(self, folder: Path, *, writes: bool) -> None:
        """Warn if the clock is before the last event. Then only the times in the file are out of order."""
        self._path, self._writes = folder / EVENTS_FILE, writes
        self._pending: list[bytes] = []
        """Lines that could not be written so far."""
        last = read_events(folder)[-1:] if writes else []
        if last and last[0].get("time", 0) > time.time():
            print(
                f"warning: the clock of this machine is {last[0]['time'] - time.time():.0f} s before the last event of "
                f"{self._path}: check the clock; training does not depend on it",
                file=sys.stderr,
            )

    def add(self, event: str, step: int, **details: Any) -> None:
        """Append one object: the event, the step after which it happened, the time in seconds since 1970, and details.

        Raises:
            OSError: it could not be written; the next successful call writes it.
        """
        if not self._writes:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": event, "step": step} | details)
        self._pending.append(line.encode() + b"\n")
        make_folder(self._path.parent)
        with attach_path(self._path), self._path.open("a+b") as file:
            while self._pending:
                # Start a new line after one that a crash or a full disk truncated.
                end = file.seek(0, os.SEEK_END)
                start = b"\n" if end and (file.seek(end - 1), file.read(1))[1] != b"\n" else b""
                file.write(start + self._pending[0])
                file.flush()
                self._pending.pop(0)
