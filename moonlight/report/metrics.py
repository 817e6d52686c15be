"""What a run's metrics.jsonl tells, read once as a stream and thinned to what a page can show."""

import math
import os
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from moonlight.progress import byte_progress
from moonlight.report.lines import Scan, entries, scan
from moonlight.report.thin import Heatmap, Series, SparseSeries, StepBuckets, packed

_SERIES = {
    "consumed_tokens",
    "loss/train",
    "loss/aux",
    "loss/spike_score",
    "optim/grad_norm",
    "optim/lr",
    "optim/global_batch_size",
    "optim/router_bias_update_rate",
    "moe/max_load",
    "moe/dead_experts",
    "attention/max_logit",
    "attention/clipped_heads",
    "speed/tokens_per_second",
    "speed/model_tflops",
    "speed/mfu",
}
_SERIES_PREFIXES = (
    "optim/grad_norm/",
    "optim/update_rms/",
    "optim/weight_rms/",
    "optim/svd_entropy/",
    "time/",
    "memory/",
)
_POINTS = {"loss/validation", "loss/held_out", "bits_per_byte/held_out"}
_POINTS_PREFIXES = ("loss/validation/", "data/tokens/")
_LARGEST = {"attention/max_logit_by_layer": True, "moe/max_load_by_layer": True}
_MAPS = _LARGEST | {"moe/load_spread_by_layer": False, "moe/load_by_expert": False}
"""Lists, and whether a bucket keeps the largest value or else the mean."""

MAX_COLUMNS, MAX_CELLS = 300, 1_600_000
"""Of a map over time: buckets of steps, and values in all of them."""
MAX_BUCKETS = 600
MAX_KEYS = 200
"""Figures of one run; a file with more names than that was not written by the trainer."""
MAX_MARKS = 500
RECENT = 100
"""Steps over whose losses the final training loss is a mean."""
_ROWS_AT_ONCE = 1000


class RunMetrics:
    """The steps of a run. Whatever the file holds beyond the known figures is passed over."""

    def __init__(self, scan: Scan, num_runs: int) -> None:
        """`num_runs` share the page, and its size."""
        self.scan = scan
        self._max_columns, self._max_cells = MAX_COLUMNS // num_runs, MAX_CELLS // num_runs
        buckets = min(MAX_BUCKETS, max(120, 2 * MAX_BUCKETS // num_runs))
        self.grid = StepBuckets.over(scan.first_step, scan.last_step, buckets)
        self.series: dict[str, Series] = {}
        self.points: dict[str, SparseSeries] = {}
        self.maps: dict[str, Heatmap] = {}
        self.steps = Series(self.grid)
        """The step itself: where a bucket's mean lies."""
        self.stages: list[tuple[int, str]] = []
        """First step and name."""
        self.skipped: list[int] = []
        """The first such step of each bucket."""
        self.num_not_finite = 0
        self.last: dict[str, Any] = {"step": -1}
        """The object of the last step."""
        self.num_steps = 0
        self.seconds = self.timed_tokens = 0.0
        """Of all steps, and the tokens of those."""
        self.dropped: set[str] = set()
        """Names of figures beyond the most that are kept."""
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._skipped_before: int | None = None
        self._rows: list[int] = []
        self._columns: dict[str, tuple[list[int], list[Any]] | None] = {}

    @property
    def recent_loss(self) -> float | None:
        """Mean training loss of the newest steps."""
        return sum(self._recent) / len(self._recent) if self._recent else None

    def add(self, entry: dict[str, Any]) -> None:
        """Take one step."""
        step = entry["step"]
        row = len(self._rows)
        self._rows.append(step)
        columns = self._columns
        for key, value in entry.items():
            column = columns[key] if key in columns else self._open(key)
            if column is not None:
                column[0].append(row)
                column[1].append(value)
        self.num_steps += 1
        if step > self.last["step"]:
            self.last = entry
        if (loss := finite(entry.get("loss/train"))) is not None:
            self._recent.append(loss)
        seconds, speed = finite(entry.get("time/step_seconds")), finite(entry.get("speed/tokens_per_second"))
        if seconds is not None:
            self.seconds += seconds
            self.timed_tokens += seconds * (speed or 0.0)
        self._look_for_marks(step, entry)
        if len(self._rows) == _ROWS_AT_ONCE:
            self.flush()

    def _open(self, key: str) -> tuple[list[int], list[Any]] | None:
        """Where the values of a key not met before go until the next flush."""
        known: dict[str, Any] | None = None
        if key in _MAPS:
            known = self.maps
            new: Any = Heatmap(
                self.scan.first_step,
                self.scan.last_step,
                self._max_columns,
                self._max_cells,
                largest=_MAPS[key],
            )
        elif key in _POINTS or key.startswith(_POINTS_PREFIXES):
            known, new = self.points, SparseSeries(self.grid)
        elif key in _SERIES or key.startswith(_SERIES_PREFIXES):
            known, new = self.series, Series(self.grid)
        if known is not None and len(known) >= MAX_KEYS:
            self.dropped.add(key)
            known = None
        if known is None:
            if len(self._columns) < 10 * MAX_KEYS:  # else they are looked at anew each time
                self._columns[key] = None
            return None
        known[key] = new
        column: tuple[list[int], list[Any]] = ([], [])
        self._columns[key] = column
        return column

    def _look_for_marks(self, step: int, entry: dict[str, Any]) -> None:
        stage = entry.get("stage")
        if isinstance(stage, str) and stage and (not self.stages or self.stages[-1][1] != stage):
            self.stages = [*self.stages, (step, stage)][:MAX_MARKS]
        not_finite = any(key in entry and finite(entry[key]) is None for key in ("loss/train", "optim/grad_norm"))
        self.num_not_finite += not_finite
        skipped = finite(entry.get("optim/skipped_steps"))
        if skipped is not None:
            before, self._skipped_before = self._skipped_before, int(skipped)
            more = int(skipped) > (before if before is not None else 0 if step == 1 else int(skipped))
        else:
            more = False
        if not_finite or more:
            bucket = (step - self.grid.first) // self.grid.width
            if not self.skipped or (self.skipped[-1] - self.grid.first) // self.grid.width != bucket:
                self.skipped.append(step)

    def flush(self) -> None:
        """Bring the newest steps into the buckets."""
        rows = np.array(self._rows, dtype=np.int64)
        if len(rows):
            self.steps.add(rows, self._rows)
        for place in (self.series, self.points, self.maps):
            for key, target in place.items():
                column = self._columns[key]
                assert column is not None
                at, values = column
                if at:
                    target.add(rows[at], values)
                    at.clear()
                    values.clear()
        self._rows.clear()

    def for_page(self) -> dict[str, Any]:
        """What page.js draws."""
        _, steps, _ = self.steps.thinned()
        tokens = self.series.get("consumed_tokens")
        # Without tokens in every bucket there is no second x axis.
        has_tokens = tokens is not None and len(tokens.filled) == len(self.steps.filled)
        drawn = {**self.series, **{key: it for key, it in self.points.items() if key.startswith("loss/validation")}}
        return {
            "first": self.grid.first,
            "width": self.grid.width,
            "size": self.grid.size,
            "last": self.scan.last_step,
            "filled": self.steps.filled.tolist() if len(self.steps.filled) < self.grid.size else None,
            "steps": packed(steps, "<f8"),
            "tokens": packed(tokens.thinned()[1], "<f8") if has_tokens and tokens else None,
            "series": {
                key: found
                for key, it in drawn.items()
                if key != "consumed_tokens" and (found := it.for_page()) is not None
            },
            "maps": {key: found for key, it in self.maps.items() if (found := it.for_page()) is not None},
        }


def finite(value: Any) -> float | None:
    """A JSON value as a finite number; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def load_run_metrics(path: Path, num_runs: int) -> RunMetrics | None:
    """Read a metrics.jsonl, which may grow meanwhile; None without a whole line that is a step's.

    Raises:
        OSError: it cannot be read.
    """
    # The trainer replaces the file when it goes back: what is open here stays one and the same.
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        with byte_progress(f"reading {path}", size) as tell:  # read twice: each pass is half of the way
            found = scan(file, lambda done: tell(done // 2))
            if found is None:
                return None
            metrics = RunMetrics(found, num_runs)
            for entry in entries(file, found, lambda done: tell((size + done) // 2)):
                metrics.add(entry)
            metrics.flush()
            tell(size)
    return metrics if metrics.num_steps else None
