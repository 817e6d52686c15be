"""Valid lines of a metrics.jsonl, read as a stream because the file may be larger than memory."""

import json
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from moonlight.config.run import MAX_STEPS

_STEP = re.compile(rb'\{"step": ?(\d{1,12}),')
"""Start of a line that the trainer wrote; any other line is parsed for its step."""
_LINES_BETWEEN_REPORTS = 500
_MAX_STEP_GAP = 1000
"""Steps. A line further ahead than this is parsed in full, since its step may be corrupt."""


@dataclass(kw_only=True)
class Scan:
    """Result of the first pass over a metrics.jsonl."""

    first_step: int
    last_step: int
    is_used: np.ndarray
    """bool (lines,): the line is the last of its step and not corrupt so far as the first pass can tell."""
    repeated: int
    """Number of lines whose step occurs again later, as after a restart."""
    truncated: bool
    """The last line has no line end and is left out."""
    corrupt_lines: list[int] = field(default_factory=list)
    """Numbers, from 1, of lines that are not a JSON object with a step."""


def scan(file: BinaryIO, report_bytes: Callable[[int], None]) -> Scan | None:
    """Find the valid lines of `file`; None if it has none. `report_bytes` gets the number of bytes read so far."""
    steps = array("q")
    corrupt_lines: list[int] = []
    done, highest, truncated = 0, -1, False
    file.seek(0)
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            truncated = True
            break
        done += len(line)
        match = _STEP.match(line)
        step = int(match[1]) if match else None
        # A corrupt line must neither replace a valid one nor stretch the x axis.
        if step is None or step <= highest or step > highest + _MAX_STEP_GAP:
            entry = parse(line)
            step = None if entry is None else entry["step"]
        if step is None or step > MAX_STEPS:
            corrupt_lines.append(number)
            step = -1
        steps.append(step)
        highest = max(highest, step)
        if number % _LINES_BETWEEN_REPORTS == 0:
            report_bytes(done)
    line_steps = np.frombuffer(steps, dtype=np.int64)
    _, reversed_index = np.unique(line_steps[::-1], return_index=True)
    is_used = np.zeros(len(line_steps), dtype=bool)
    is_used[len(line_steps) - 1 - reversed_index] = True
    is_used[line_steps < 0] = False
    if not is_used.any():
        return None
    return Scan(
        first_step=int(line_steps[is_used].min()),
        last_step=int(line_steps.max()),
        is_used=is_used,
        repeated=int((line_steps >= 0).sum() - is_used.sum()),
        truncated=truncated,
        corrupt_lines=corrupt_lines,
    )


def entries(file: BinaryIO, scan_result: Scan, report_bytes: Callable[[int], None]) -> Iterator[dict[str, Any]]:
    """Yield the objects of the valid lines, in file order; add corrupt ones to `scan_result.corrupt_lines`."""
    done = 0
    file.seek(0)
    for number, (line, is_used) in enumerate(zip(file, scan_result.is_used, strict=False), start=1):
        done += len(line)
        if is_used:
            entry = parse(line)
            if entry is None:
                scan_result.corrupt_lines.append(number)
            else:
                yield entry
        if number % _LINES_BETWEEN_REPORTS == 0:
            report_bytes(done)
    scan_result.corrupt_lines.sort()


def parse(line: bytes) -> dict[str, Any] | None:
    """Return the object of one line; None unless it is a JSON object whose step is an integer >= 0."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or type(entry.get("step")) is not int or entry["step"] < 0:
        return None
    return entry
