"""The metrics.jsonl of a run, read as a stream and downsampled to what a page can show."""

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
"""Metrics that are lists; True: a bucket keeps the largest value, False: the mean."""

MAX_COLUMNS, MAX_CELLS = 300, 1_600_000
"""Limits of a heatmap: buckets of steps, and values in all buckets."""
MAX_BUCKETS = 600
MAX_KEYS = 200
"""Maximum number of metrics of one kind; the trainer writes fewer."""
MAX_MARKS = 500
RECENT = 100
"""Number of last steps whose mean is the final training loss."""
_ROWS_PER_FLUSH = 1000


class RunMetrics:
    """Metrics of all steps of a run, in buckets. Unknown metrics are ignored."""

    def __init__(self, scan: Scan, num_runs: int) -> None:
        """`num_runs` is the number of runs on the page: more runs get fewer buckets each."""
        self.scan = scan
        self._max_columns, self._max_cells = MAX_COLUMNS // num_runs, MAX_CELLS // num_runs
        buckets = min(MAX_BUCKETS, max(120, 2 * MAX_BUCKETS // num_runs))
        self.grid = StepBuckets.over(scan.first_step, scan.last_step, buckets)
        self.series: dict[str, Series] = {}
        self.points: dict[str, SparseSeries] = {}
        self.maps: dict[str, Heatmap] = {}
        self.steps = Series(self.grid)
        """The step number as a series: its mean is the x position of a bucket."""
        self.stages: list[tuple[int, str]] = []
        """(first step, name) of each stage."""
        self.skipped: list[int] = []
        """First skipped or non-finite step of each bucket."""
        self.num_not_finite = 0
        self.last: dict[str, Any] = {"step": -1}
        """The object of the last step."""
        self.num_steps = 0
        self.seconds = self.timed_tokens = 0.0
        """Total step time, and tokens of the steps that have one."""
        self.dropped: set[str] = set()
        """Names of metrics beyond MAX_KEYS."""
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._skipped_before: int | None = None
        self._rows: list[int] = []
        self._columns: dict[str, tuple[list[int], list[Any]] | None] = {}

    @property
    def recent_loss(self) -> float | None:
        """Mean training loss of the last RECENT steps; None without any."""
        return sum(self._recent) / len(self._recent) if self._recent else None

    def add(self, entry: dict[str, Any]) -> None:
        """Add the metrics of one step."""
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
        self._update_marks(step, entry)
        if len(self._rows) == _ROWS_PER_FLUSH:
            self.flush()

    def _open(self, key: str) -> tuple[list[int], list[Any]] | None:
        """Return the rows and values that buffer a new key until the next flush; None to ignore the key."""
        targets: dict[str, Any] | None = None
        if key in _MAPS:
            targets = self.maps
            new: Any = Heatmap(
                self.scan.first_step, self.scan.last_step, self._max_columns, self._max_cells, largest=_MAPS[key]
            )
        elif key in _POINTS or key.startswith(_POINTS_PREFIXES):
            targets, new = self.points, SparseSeries(self.grid)
        elif key in _SERIES or key.startswith(_SERIES_PREFIXES):
            targets, new = self.series, Series(self.grid)
        if targets is not None and len(targets) >= MAX_KEYS:
            self.dropped.add(key)
            targets = None
        if targets is None:
            if len(self._columns) < 10 * MAX_KEYS:  # beyond that, each key is looked up again in each step
                self._columns[key] = None
            return None
        targets[key] = new
        column: tuple[list[int], list[Any]] = ([], [])
        self._columns[key] = column
        return column

    def _update_marks(self, step: int, entry: dict[str, Any]) -> None:
        """Record the step if it starts a stage, was skipped or is not finite."""
        stage = entry.get("stage")
        if isinstance(stage, str) and stage and (not self.stages or self.stages[-1][1] != stage):
            self.stages = [*self.stages, (step, stage)][:MAX_MARKS]
        not_finite = any(key in entry and finite(entry[key]) is None for key in ("loss/train", "optim/grad_norm"))
        self.num_not_finite += not_finite
        skipped = finite(entry.get("optim/skipped_steps"))
        if skipped is not None:
            before, self._skipped_before = self._skipped_before, int(skipped)
            increased = int(skipped) > (before if before is not None else 0 if step == 1 else int(skipped))
        else:
            increased = False
        if not_finite or increased:
            bucket = (step - self.grid.first) // self.grid.width
            if not self.skipped or (self.skipped[-1] - self.grid.first) // self.grid.width != bucket:
                self.skipped.append(step)

    def flush(self) -> None:
        """Move the buffered steps into the buckets."""
        rows = np.array(self._rows, dtype=np.int64)
        if len(rows):
            self.steps.add(rows, self._rows)
        for targets in (self.series, self.points, self.maps):
            for key, target in targets.items():
                column = self._columns[key]
                assert column is not None
                row_indices, values = column
                if row_indices:
                    target.add(rows[row_indices], values)
                    row_indices.clear()
                    values.clear()
        self._rows.clear()

    def for_page(self) -> dict[str, Any]:
        """Return the data that page.js draws, as JSON values; arrays are base64."""
        _, steps, _ = self.steps.thinned()
        tokens = self.series.get("consumed_tokens")
        # Without tokens in every bucket there is no second x axis.
        has_tokens = tokens is not None and len(tokens.filled) == len(self.steps.filled)
        drawn = {
            **self.series,
            **{key: points for key, points in self.points.items() if key.startswith("loss/validation")},
        }
        return {
            "first": self.grid.first,
            "width": self.grid.width,
            "size": self.grid.size,
            "last": self.scan.last_step,
            "filled": self.steps.filled.tolist() if len(self.steps.filled) < self.grid.size else None,
            "steps": packed(steps, "<f8"),
            "tokens": packed(tokens.thinned()[1], "<f8") if has_tokens and tokens else None,
            "series": {
                key: data
                for key, series in drawn.items()
                if key != "consumed_tokens" and (data := series.for_page()) is not None
            },
            "maps": {key: data for key, heatmap in self.maps.items() if (data := heatmap.for_page()) is not None},
        }


def finite(value: Any) -> float | None:
    """Return a JSON value as a finite float; None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def load_run_metrics(path: Path, num_runs: int) -> RunMetrics | None:
    """Read a metrics.jsonl, which may grow during the call; None without a complete line of a step.

    Raises:
        OSError: it cannot be read.
    """
    # The trainer replaces the file when it rolls back; this open file does not change.
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        with byte_progress(f"reading {path}", size) as report_bytes:  # two passes, half of the progress each
            scan_result = scan(file, lambda done: report_bytes(done // 2))
            if scan_result is None:
                return None
            metrics = RunMetrics(scan_result, num_runs)
            for entry in entries(file, scan_result, lambda done: report_bytes((size + done) // 2)):
                metrics.add(entry)
            metrics.flush()
            report_bytes(size)
    return metrics if metrics.num_steps else None
