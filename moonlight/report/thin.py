"""Downsampling: metrics of any number of steps in a bounded number of buckets of steps."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_POINTS = 600
"""Maximum number of values of a SparseSeries; beyond it, the values are downsampled like a Series."""

MISSING, DEAD, LOWEST, HIGHEST = 0, 1, 2, 255
"""Codes of expert loads: not recorded, exactly zero, and the ends of the scale."""
MAX_LOG2 = 3.0
"""The scale is from 1/8 to 8 times the even load."""


@dataclass(frozen=True)
class StepBuckets:
    """Buckets of equal width over the steps of a run."""

    first: int
    width: int
    size: int

    @classmethod
    def over(cls, first: int, last: int, max_buckets: int) -> "StepBuckets":
        """Return the finest buckets, at most `max_buckets`, over steps `first` to `last`, both included."""
        width = -(-(last - first + 1) // max_buckets)
        return cls(first, width, -(-(last - first + 1) // width))

    def index(self, steps: np.ndarray) -> np.ndarray:
        """Return the bucket index of each step; same shape as `steps`."""
        return (steps - self.first) // self.width


class Series:
    """Smallest, mean and largest value of each bucket; a value that is not a finite number is missing."""

    def __init__(self, grid: StepBuckets) -> None:
        self.grid = grid
        self._count = np.zeros(grid.size, dtype=np.int64)
        self._total = np.zeros(grid.size)
        self._lowest = np.full(grid.size, np.inf)
        self._highest = np.full(grid.size, -np.inf)
        self._newest = (-1, math.nan)
        """(step, value) of the newest step."""

    def add(self, steps: np.ndarray, values: Sequence[Any]) -> None:
        """Add values of `steps`, int64 (n,), in any order."""
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
        """Indices of the buckets with a value, ascending, int64."""
        return np.flatnonzero(self._count)

    def thinned(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return smallest, mean and largest value of each filled bucket, float64 (filled,)."""
        filled = self.filled
        return self._lowest[filled], self._total[filled] / self._count[filled], self._highest[filled]

    def mean(self) -> float | None:
        """Return the mean of all values; None without any."""
        return float(self._total.sum() / self._count.sum()) if self._count.any() else None

    def for_page(self) -> dict[str, Any] | None:
        """Return the data that page.js draws; None without any value. Smallest and largest are absent if equal."""
        filled = self.filled
        if not len(filled):
            return None
        lowest, mean, highest = self.thinned()
        data: dict[str, Any] = {"mean": packed(mean, "<f4"), "newest": self._newest[1]}
        if len(filled) < self.grid.size:
            data["at"] = filled.tolist()
        if (lowest < highest).any():
            data |= {"low": packed(lowest, "<f4"), "high": packed(highest, "<f4")}
        return data


class SparseSeries(Series):
    """Series with values in few steps: keeps single values up to MAX_POINTS, then downsamples."""

    def __init__(self, grid: StepBuckets) -> None:
        super().__init__(grid)
        self._points: list[tuple[int, float]] = []
        self._is_full = False
        self.last: tuple[int, float] | None = None
        """(step, value) of the newest step; None without any."""

    def add(self, steps: np.ndarray, values: Sequence[Any]) -> None:
        super().add(steps, values)
        numbers = to_numbers(values)
        finite = np.isfinite(numbers)
        new = list(zip(steps[finite].tolist(), numbers[finite].tolist(), strict=True))
        if new and (self.last is None or max(new)[0] >= self.last[0]):
            self.last = max(new)
        self._is_full = self._is_full or len(self._points) + len(new) > MAX_POINTS
        self._points = [] if self._is_full else sorted(self._points + new)

    def for_page(self) -> dict[str, Any] | None:
        """Return the single values, or the buckets if there are too many values."""
        if self._is_full or not self._points:
            return super().for_page()
        steps, values = zip(*self._points, strict=True)
        return {"points": list(steps), "mean": packed(np.array(values), "<f4")}


class Heatmap:
    """Mean or largest value of each bucket, elementwise, of a list per step: (layers,) or (layers, experts)."""

    def __init__(self, first: int, last: int, max_columns: int, max_cells: int, *, largest: bool) -> None:
        self._span, self._max_columns, self._max_cells = (first, last), max_columns, max_cells
        self._largest = largest
        self.shape: tuple[int, ...] | None = None
        """Shape of the first list; None before it."""
        self.num_mismatched = 0
        """Number of lists of another shape; they are left out."""

    def add(self, steps: np.ndarray, values: Sequence[Any]) -> None:
        """Add lists of `steps`, int64 (n,)."""
        for step, value in zip(steps, values, strict=True):
            try:
                array = np.array(value, dtype=np.float64)
            except (ValueError, TypeError, OverflowError):
                array = np.zeros(())
            if self.shape is None and 1 <= array.ndim <= 2 and 0 < array.size <= self._max_cells:
                self._allocate(array.shape)
            if self.shape is None or array.shape != self.shape:
                self.num_mismatched += 1
                continue
            array[~np.isfinite(array)] = np.nan
            column = self.grid.index(step)
            if self._largest:
                self._values[column] = np.fmax(self._values[column], array)
            else:
                self._values[column] += np.nan_to_num(array)
                self._count[column] += np.isfinite(array)

    def _allocate(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        cells = int(np.prod(shape))
        self.grid = StepBuckets.over(*self._span, max(1, min(self._max_columns, self._max_cells // cells)))
        self._values = np.full((self.grid.size, *shape), np.nan if self._largest else 0.0)
        self._count = np.zeros((self.grid.size, *shape), dtype=np.int32)

    def thinned(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the filled buckets, and their values.

        Values are float64 (filled, layers) or (filled, layers, experts), NaN if missing.
        """
        assert self.shape is not None
        values = self._values
        if not self._largest:
            with np.errstate(invalid="ignore", divide="ignore"):
                values = self._values / self._count
        filled = np.flatnonzero(np.isfinite(values).reshape(self.grid.size, -1).any(axis=1))
        return filled, values[filled]

    def for_page(self) -> dict[str, Any] | None:
        """Return the data that page.js draws: float32 per layer, or one code per expert; None without any value."""
        if self.shape is None:
            return None
        filled, values = self.thinned()
        if not len(filled):
            return None
        data = {"at": filled.tolist(), "first": self.grid.first, "width": self.grid.width, "shape": self.shape}
        if len(self.shape) == 2:
            return data | {"codes": packed(load_codes(values), "u1")}
        return data | {"mean": packed(values, "<f4")}


def load_codes(load: np.ndarray) -> np.ndarray:
    """Encode loads relative to the even load as uint8: log2 in 253 even steps, with codes for zero and for NaN."""
    codes = np.full(load.shape, MISSING, dtype=np.uint8)
    with np.errstate(invalid="ignore", divide="ignore"):
        fraction = (np.clip(np.log2(load), -MAX_LOG2, MAX_LOG2) + MAX_LOG2) / (2 * MAX_LOG2)
    above = load > 0
    codes[above] = LOWEST + np.rint(fraction[above] * (HIGHEST - LOWEST))
    codes[load == 0] = DEAD
    return codes


def to_numbers(values: Sequence[Any]) -> np.ndarray:
    """Return JSON values as float64 (n,); NaN if a value is not a number, or too large."""
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
    """Return an array as `dtype` bytes, in base64."""
    with np.errstate(over="ignore"):
        return base64.b64encode(values.astype(dtype).tobytes()).decode()
