"""The lines of a metrics.jsonl that count, read as a stream: such a file may be larger than memory."""

import json
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from moonlight.config.run import MAX_STEPS

_STEP = re.compile(rb'\{"step": ?(\d{1,12}),')
"""How a line of the trainer begins; others are parsed for their step."""
_LINES_BETWEEN_TOLD = 500
_FAR = 1000
"""Steps."""


@dataclass(kw_only=True)
class Scan:
    """What the first pass over a metrics.jsonl found."""

    first_step: int
    last_step: int
    counts: np.ndarray
    """bool of each line: the last one of its step, and not seen to be damaged."""
    num_bytes: int
    """Of whole lines: a run in progress may write on meanwhile."""
    repeated: int
    """Lines whose step comes again later, as after a restart."""
    cut: bool
    """The last line has no end yet, and is left out."""
    damaged: list[int] = field(default_factory=list)
    """Numbers of lines, from 1, that are no JSON object with a step."""


def scan(file: BinaryIO, tell: Callable[[int], None]) -> Scan | None:
    """Find the lines that count, from the beginning of `file`; None if there is none. `tell` hears the bytes done."""
    steps = array("q")
    damaged: list[int] = []
    done, highest, cut = 0, -1, False
    file.seek(0)
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            cut = True
            break
        done += len(line)
        begins = _STEP.match(line)
        step = int(begins[1]) if begins else None
        # A damaged line must neither take the place of a sound one nor stretch the page.
        if step is None or step <= highest or step > highest + _FAR:
            entry = parse(line)
            step = None if entry is None else entry["step"]
        if step is None or step > MAX_STEPS:
            damaged.append(number)
            step = -1
        steps.append(step)
        highest = max(highest, step)
        if number % _LINES_BETWEEN_TOLD == 0:
            tell(done)
    found = np.frombuffer(steps, dtype=np.int64)
    _, from_the_end = np.unique(found[::-1], return_index=True)
    counts = np.zeros(len(found), dtype=bool)
    counts[len(found) - 1 - from_the_end] = True
    counts[found < 0] = False
    if not counts.any():
        return None
    return Scan(
        first_step=int(found[counts].min()),
        last_step=int(found.max()),
        counts=counts,
        num_bytes=done,
        repeated=int((found >= 0).sum() - counts.sum()),
        cut=cut,
        damaged=damaged,
    )


def entries(file: BinaryIO, scan_result: Scan, tell: Callable[[int], None]) -> Iterator[dict[str, Any]]:
    """The objects of the lines that count, in the order of the file; damaged ones are added to `found.damaged`."""
    done = 0
    file.seek(0)
    for number, (line, counts) in enumerate(zip(file, scan_result.counts, strict=False), start=1):
        done += len(line)
        if counts:
            entry = parse(line)
            if entry is None:
                scan_result.damaged.append(number)
            else:
                yield entry
        if number % _LINES_BETWEEN_TOLD == 0:
            tell(done)
    scan_result.damaged.sort()


def parse(line: bytes) -> dict[str, Any] | None:
    """The object of one line; None unless it is one and its step is a whole number."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or type(entry.get("step")) is not int or entry["step"] < 0:
        return None
    return entry
