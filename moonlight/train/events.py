"""What happened to a run: events.jsonl, one object each, appended and never changed."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from moonlight.errors import naming
from moonlight.files import make_folder

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


class Events:
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
        with naming(self._path), self._path.open("a+b") as file:
            while self._left:
                # A line that a crash or a full disk cut off must not swallow this one.
                end = file.seek(0, os.SEEK_END)
                start = b"\n" if end and (file.seek(end - 1), file.read(1))[1] != b"\n" else b""
                file.write(start + self._left[0])
                file.flush()
                self._left.pop(0)
