"""Histories of any length in a bounded number of buckets of steps."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_POINTS = 600
"""Values that are kept one by one, such as validation losses; more of them are thinned like any series."""

MISSING, DEAD, LOWEST, HIGHEST = 0, 1, 2, 255
"""Codes of expert loads: none recorded, exactly zero, and the ends of the scale."""
MAX_LOG2 = 3.0
"""The scale goes from 1/8 to 8 times the even share."""


@dataclass(frozen=True)
class StepBuckets:
    """Buckets of equal width over the steps of a run."""

    first: int
    width: int
    size: int

    @classmethod
    def over(cls, first: int, last: int, max_buckets: int) -> "StepBuckets":
        """The finest one of at most `most` buckets that holds steps `first` to `last`."""
        width = -(-(last - first + 1) // max_buckets)
        return cls(first, width, -(-(last - first + 1) // width))

    def index(self, steps: np.ndarray) -> np.ndarray:
        """The bucket of each step."""
        return (steps - self.first) // self.width


class Series:
    """Smallest, mean and largest value of each bucket; what is not a finite number counts as missing."""

    def __init__(self, grid: StepBuckets) -> None:
        self.grid = grid
        self._count = np.zeros(grid.size, dtype=np.int64)
        self._total = np.zeros(grid.size)
        self._lowest = np.full(grid.size, np.inf)
        self._highest = np.full(grid.size, -np.inf)
        self._newest = (-1, math.nan)
        """Step and value."""

    def add(self, steps: np.ndarray, values: Sequence[Any]) -> None:
        """Take the values of some steps (int64), in any order."""
        numbers = to_numbers(values)
        finite = np.isfinite(numbers)
        index, numbers = self.grid.index(steps[finite]), numbers[finite]
        if len(numbers) and (newest := int(np.argmax(steps[finite]))) >= 0:
            self._newest = max(self._newest, (int(steps[finite][newest]), float(numbers[newest])))
        self._count += np.bincount(index, minlength=self.grid.size)
        with np.errstate(over="ignore"):
            self._total += np.bincount(index, weights=numbers, minlength=self.grid.size)
        np.minimum.at(self._lowest, index, numbers)
        np.maximum.at(self._highest, index, numbers)

    @property
    def filled(self) -> np.ndarray:
        """Buckets with a value."""
        return np.flatnonzero(self._count)

    def thinned(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Smallest, mean and largest value of the filled buckets, float64."""
        at = self.filled
        return self._lowest[at], self._total[at] / self._count[at], self._highest[at]

    def mean(self) -> float | None:
        """Of all values; None without any."""
        return float(self._total.sum() / self._count.sum()) if self._count.any() else None

    def for_page(self) -> dict[str, Any] | None:
        """What page.js draws; None without any value. Smallest and largest are left out where they say nothing new."""
        at = self.filled
        if not len(at):
            return None
        lowest, mean, highest = self.thinned()
        found: dict[str, Any] = {"mean": packed(mean, "<f4"), "newest": self._newest[1]}
        if len(at) < self.grid.size:
            found["at"] = at.tolist()
        if (lowest < highest).any():
            found |= {"low": packed(lowest, "<f4"), "high": packed(highest, "<f4")}
        return found


class SparseSeries(Series):
    """Values that come now and then, kept one by one as long as they are few."""

    def __init__(self, grid: StepBuckets) -> None:
        super().__init__(grid)
        self._points: list[tuple[int, float]] = []
        self._many = False
        self.last: tuple[int, float] | None = None
        """Step and value of the newest."""

    def add(self, steps: np.ndarray, values: Sequence[Any]) -> None:
        super().add(steps, values)
        numbers = to_numbers(values)
        finite = np.isfinite(numbers)
        new = list(zip(steps[finite].tolist(), numbers[finite].tolist(), strict=True))
        if new and (self.last is None or max(new)[0] >= self.last[0]):
            self.last = max(new)
        self._many = self._many or len(self._points) + len(new) > MAX_POINTS
        self._points = [] if self._many else sorted(self._points + new)

    def for_page(self) -> dict[str, Any] | None:
        """The points themselves, or else as any series."""
        if self._many or not self._points:
            return super().for_page()
        steps, values = zip(*self._points, strict=True)
        return {"points": list(steps), "mean": packed(np.array(values), "<f4")}


class Heatmap:
    """A list in each step, of layers or of experts in each layer: its mean, or its largest, in each bucket."""

    def __init__(self, first: int, last: int, max_columns: int, max_cells: int, *, largest: bool) -> None:
        self._span, self._max_columns, self._max_cells = (first, last), max_columns, max_cells
        self._largest = largest
        self.shape: tuple[int, ...] | None = None
        """Of the first list; lists of another shape are counted in `strange` and left out."""
        self.strange = 0

    def add(self, steps: np.ndarray, values: Sequence[Any]) -> None:
        """Take the lists of some steps (int64)."""
        for step, value in zip(steps, values, strict=True):
            try:
                array = np.array(value, dtype=np.float64)
            except (ValueError, TypeError, OverflowError):
                array = np.zeros(())
            if self.shape is None and 1 <= array.ndim <= 2 and 0 < array.size <= self._max_cells:
                self._begin(array.shape)
            if self.shape is None or array.shape != self.shape:
                self.strange += 1
                continue
            array[~np.isfinite(array)] = np.nan
            column = self.grid.index(step)
            if self._largest:
                self._values[column] = np.fmax(self._values[column], array)
            else:
                self._values[column] += np.nan_to_num(array)
                self._count[column] += np.isfinite(array)

    def _begin(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        cells = int(np.prod(shape))
        self.grid = StepBuckets.over(*self._span, max(1, min(self._max_columns, self._max_cells // cells)))
        self._values = np.full((self.grid.size, *shape), np.nan if self._largest else 0.0)
        self._count = np.zeros((self.grid.size, *shape), dtype=np.int32)

    def thinned(self) -> tuple[np.ndarray, np.ndarray]:
        """The filled buckets, and their values: float64 (buckets, layers) or (buckets, layers, experts), or NaN."""
        assert self.shape is not None
        values = self._values
        if not self._largest:
            with np.errstate(invalid="ignore", divide="ignore"):
                values = self._values / self._count
        at = np.flatnonzero(np.isfinite(values).reshape(self.grid.size, -1).any(axis=1))
        return at, values[at]

    def for_page(self) -> dict[str, Any] | None:
        """What page.js draws: float32 of each layer, or a code of each expert."""
        if self.shape is None:
            return None
        at, values = self.thinned()
        if not len(at):
            return None
        found = {"at": at.tolist(), "first": self.grid.first, "width": self.grid.width, "shape": self.shape}
        if len(self.shape) == 2:
            return found | {"codes": packed(load_codes(values), "u1")}
        return found | {"mean": packed(values, "<f4")}


def load_codes(load: np.ndarray) -> np.ndarray:
    """Loads relative to the even share as uint8: log2 of them in 253 even steps, with codes for zero and for NaN."""
    codes = np.full(load.shape, MISSING, dtype=np.uint8)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = (np.clip(np.log2(load), -MAX_LOG2, MAX_LOG2) + MAX_LOG2) / (2 * MAX_LOG2)
    above = load > 0
    codes[above] = LOWEST + np.rint(share[above] * (HIGHEST - LOWEST))
    codes[load == 0] = DEAD
    return codes


def to_numbers(values: Sequence[Any]) -> np.ndarray:
    """float64 of JSON values; NaN for what is no number, or too large for one."""
    try:
        numbers = np.array(values, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        numbers = np.zeros(())
    return numbers if numbers.shape == (len(values),) else np.array([_number(value) for value in values])


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) else np.nan
    except OverflowError:
        return np.nan


def packed(values: np.ndarray, dtype: str) -> str:
    """The bytes of an array, as base64."""
    with np.errstate(over="ignore"):
        return base64.b64encode(values.astype(dtype).tobytes()).decode()
