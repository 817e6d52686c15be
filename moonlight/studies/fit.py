"""Fit of L = a C^b by least squares of log L on log C, and the fraction of AdamW's training FLOPs that Muon needs.

Intervals come from a bootstrap. It draws sizes with replacement, the same ones for both optimizers, and then draws the
seeds of each drawn size, separately for each optimizer. The intervals cover the scatter of sizes around the line and
the scatter of seeds. They do not cover a coarse grid of learning rates or a law that bends. The interpolation between
Muon's sizes needs no law.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moonlight.errors import UserError
from moonlight.studies.ladder import MIN_SIZES

DRAWS = 10_000
"""Bootstrap draws."""
LEVEL = 0.95
"""Confidence level of the intervals."""
PFLOPS_DAY = 1e15 * 86400
"""FLOPs of a PFLOP/s-day, the paper's unit of C."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class SizeLosses:
    """One size of one optimizer, at its best learning rate."""

    flops: float
    losses: tuple[float, ...]
    """Held-out losses of all seeds, nats per token."""


@dataclass(frozen=True)
class ScalingLaw:
    """L = a C^b with C in PFLOP/s-days and L in nats per token, and the draws of the bootstrap."""

    a: float
    b: float
    a_interval: Interval
    b_interval: Interval
    max_deviation: float
    """Largest distance of a size from the line, as a fraction of its loss."""
    log_a: np.ndarray
    """Natural logarithms of a, float64 [draws]."""
    slopes: np.ndarray
    """b, float64 [draws]."""

    def loss(self, flops: float) -> float:
        return float(self.a * (flops / PFLOPS_DAY) ** self.b)

    def loss_interval(self, flops: float) -> Interval:
        return interval(np.exp(self.log_a + self.slopes * np.log(flops / PFLOPS_DAY)))


@dataclass(frozen=True)
class FlopsRatio:
    """Muon's training FLOPs over AdamW's, for the loss that AdamW reaches with `flops`."""

    flops: float
    loss: float
    ratio: float
    interval: Interval
    is_measured: bool
    """True if Muon's FLOPs are within the range that it was trained with.

    Otherwise a ratio from the laws is an extrapolation. An interpolated ratio is 0 or infinite, and its interval
    extends from there to the ratio at Muon's nearest size.
    """


@dataclass(frozen=True)
class Comparison:
    """The laws of both optimizers and the FLOPs ratios between them."""

    laws: dict[str, ScalingLaw]
    ratios: tuple[FlopsRatio, ...]
    """From the laws, at the smallest FLOPs of the ladder, at the geometric mean and at the largest FLOPs."""
    interpolated: tuple[FlopsRatio, ...]
    """At each of AdamW's sizes in ascending order, between Muon's neighboring sizes; intervals cover seeds only."""

    @property
    def middle(self) -> FlopsRatio:
        return self.ratios[1]


def interval(values: np.ndarray) -> Interval:
    """Return the central 95% of the draws, including infinite draws."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return float(low), float(high)


def least_squares(log_flops: np.ndarray, log_losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return intercepts and slopes, each [...], of lines through the points [..., points]; NaN is a missing point."""
    mean_x, mean_y = np.nanmean(log_flops, -1, keepdims=True), np.nanmean(log_losses, -1, keepdims=True)
    centered = log_flops - mean_x
    slope = np.nansum(centered * (log_losses - mean_y), -1) / np.nansum(centered**2, -1)
    return mean_y[..., 0] - slope * mean_x[..., 0], slope


def compare(size_losses: Mapping[str, Mapping[str, SizeLosses]], draws: int = DRAWS, seed: int = 0) -> Comparison:
    """Fit the law of each optimizer and compare the laws.

    Args:
        size_losses: losses by optimizer ("muon", "adamw") and size.

    Raises:
        UserError: an optimizer has fewer sizes than the fit needs, or its loss does not fall with FLOPs.
    """
    for name, by_size in size_losses.items():
        if len(by_size) < MIN_SIZES:
            raise UserError(
                f"{name} has results at {len(by_size)} sizes ({', '.join(by_size) or 'none'}): a fit needs at least "
                f"{MIN_SIZES}"
            )
        if len({entry.flops for entry in by_size.values()}) < MIN_SIZES:
            raise UserError(
                f"{name} has results at fewer than {MIN_SIZES} different FLOPs: a fit needs at least {MIN_SIZES}"
            )
    generator = np.random.default_rng(seed)
    sizes = sorted(set().union(*size_losses.values()))
    laws = _fit_laws(size_losses, sizes, _draw_sizes(size_losses, sizes, draws, generator), generator)
    for name, law in laws.items():
        if law.b >= 0:
            raise UserError(
                f"{name}: the loss does not fall with FLOPs over these sizes (L = {law.a:.4g} C^{law.b:+.4f}), so "
                "no loss is reached by both optimizers: give larger sizes more tokens, or add sizes"
            )
    flops_by_optimizer = [[entry.flops for entry in by_size.values()] for by_size in size_losses.values()]
    low, high = max(map(min, flops_by_optimizer)), min(map(max, flops_by_optimizer))
    muon = [entry.flops for entry in size_losses["muon"].values()]
    muon_range = (min(muon), max(muon))
    ratios = tuple(
        _flops_ratio(laws["muon"], laws["adamw"], flops, muon_range) for flops in (low, (low * high) ** 0.5, high)
    )
    return Comparison(laws, ratios, _interpolate(size_losses, draws, generator))


def _draw_sizes(
    size_losses: Mapping[str, Mapping[str, SizeLosses]],
    sizes: Sequence[str],
    draws: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """Draw indices of sizes, int [draws, sizes]. A draw that determines no line for an optimizer is drawn again."""
    drawn = generator.integers(len(sizes), size=(draws, len(sizes)))
    while True:
        invalid = np.zeros(draws, dtype=bool)
        for by_size in size_losses.values():
            flops = np.array([by_size[size].flops if size in by_size else np.nan for size in sizes])[drawn]
            invalid |= ~(np.nanmax(np.c_[flops, [-1.0] * draws], -1) > np.nanmin(np.c_[flops, [np.inf] * draws], -1))
        if not invalid.any():
            return drawn
        drawn[invalid] = generator.integers(len(sizes), size=(int(invalid.sum()), len(sizes)))


def _fit_laws(
    size_losses: Mapping[str, Mapping[str, SizeLosses]],
    sizes: Sequence[str],
    drawn: np.ndarray,
    generator: np.random.Generator,
) -> dict[str, ScalingLaw]:
    laws = {}
    for name, by_size in size_losses.items():
        x = np.log([entry.flops / PFLOPS_DAY for entry in by_size.values()])
        y = np.log([np.mean(entry.losses) for entry in by_size.values()])
        log_a, b = least_squares(x, y)
        max_deviation = float(np.expm1(np.abs(y - log_a - b * x).max()))
        # Each time that a size is drawn, its seeds are drawn independently, [draws, sizes]; NaN: a missing size.
        drawn_x, drawn_y = np.full(drawn.shape, np.nan), np.full(drawn.shape, np.nan)
        for index, size in enumerate(sizes):
            if size in by_size:
                mask = drawn == index
                drawn_x[mask] = np.log(by_size[size].flops / PFLOPS_DAY)
                drawn_y[mask] = _drawn_log_means(by_size[size], int(mask.sum()), generator)
        drawn_log_a, drawn_b = least_squares(drawn_x, drawn_y)
        intervals = interval(np.exp(drawn_log_a)), interval(drawn_b)
        laws[name] = ScalingLaw(float(np.exp(log_a)), float(b), *intervals, max_deviation, drawn_log_a, drawn_b)
    return laws


def _flops_ratio(muon: ScalingLaw, adamw: ScalingLaw, flops: float, muon_range: Interval) -> FlopsRatio:
    """Compute the ratio at AdamW's loss with `flops`; each draw uses its own pair of lines.

    `muon_range`: smallest and largest FLOPs that Muon was trained with.
    """
    log_c = np.log(flops / PFLOPS_DAY)

    def ratio(muon_a: np.ndarray, muon_b: np.ndarray, adamw_a: np.ndarray, adamw_b: np.ndarray) -> np.ndarray:
        log_loss = adamw_a + adamw_b * log_c
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            ratios = np.exp((log_loss - muon_a) / muon_b - log_c)
        return np.where(muon_b < 0, ratios, np.inf)  # a line that does not fall never reaches the loss

    point = float(ratio(*(np.array(value) for value in (np.log(muon.a), muon.b, np.log(adamw.a), adamw.b))))
    drawn = ratio(muon.log_a, muon.slopes, adamw.log_a, adamw.slopes)
    is_measured = 0.999 * muon_range[0] <= point * flops <= 1.001 * muon_range[1]
    return FlopsRatio(flops, adamw.loss(flops), point, interval(drawn), is_measured)


def _interpolate(
    size_losses: Mapping[str, Mapping[str, SizeLosses]], draws: int, generator: np.random.Generator
) -> tuple[FlopsRatio, ...]:
    """Compute the ratio at each of AdamW's sizes by interpolating log L linearly in log C between Muon's sizes."""
    muon = sorted(size_losses["muon"].values(), key=lambda entry: entry.flops)
    x = np.log([entry.flops for entry in muon])
    y = np.log([np.mean(entry.losses) for entry in muon])
    drawn_y = np.stack([_drawn_log_means(entry, draws, generator) for entry in muon], -1)
    ratios = []
    for entry in sorted(size_losses["adamw"].values(), key=lambda entry: entry.flops):
        loss = float(np.mean(entry.losses))
        ratio = float(np.exp(_crossing(x, y, np.log(loss)) - np.log(entry.flops)))
        drawn = np.exp(_crossing(x, drawn_y, _drawn_log_means(entry, draws, generator)) - np.log(entry.flops))
        is_measured = 0 < ratio < np.inf
        smallest, largest = np.exp(x[[0, -1]] - np.log(entry.flops))
        bounds = interval(drawn) if is_measured else (0.0, float(smallest)) if ratio == 0 else (float(largest), np.inf)
        ratios.append(FlopsRatio(entry.flops, loss, ratio, bounds, is_measured))
    return tuple(ratios)


def _drawn_log_means(entry: SizeLosses, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Return logarithms of mean losses over seeds drawn with replacement, float64 [draws]."""
    values = np.array(entry.losses)
    return np.log(values[generator.integers(len(values), size=(draws, len(values)))].mean(-1))


def _crossing(x: np.ndarray, y: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the smallest x at which the polylines through x [points] and y [..., points] fall to `target` [...].

    The result is minus infinity if the first point is below the target, and infinity if no point is.
    """
    crossings = np.full(np.shape(target), np.inf)
    for index in reversed(range(len(x) - 1)):
        before, after = y[..., index], y[..., index + 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            crossing = x[index] + (x[index + 1] - x[index]) * (before - target) / (before - after)
        crossings = np.where((after <= target) & (target <= before) & (after < before), crossing, crossings)
    return np.where(target > y[..., 0], -np.inf, crossings)
