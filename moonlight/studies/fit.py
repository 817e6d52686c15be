"""L = a C^b by least squares of log L on log C, and how much of AdamW's training FLOPs Muon needs for the same loss.

Intervals come from a bootstrap that draws sizes with replacement, the same ones for both optimizers, and then at each
drawn size its seeds, the optimizers' apart. It knows the scatter of sizes about the line and that of seeds; not that a
grid of learning rates is coarse, nor that a law may bend. What is read off between Muon's sizes needs no law.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moonlight.errors import UserError
from moonlight.studies.ladder import MIN_SIZES

DRAWS = 10_000
LEVEL = 0.95
"""Of the intervals."""
PFLOPS_DAY = 1e15 * 86400
"""FLOPs of a PFLOP/s-day, the paper's unit of C."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class SizeLosses:
    """One size of one optimizer, at its best learning rate."""

    flops: float
    losses: tuple[float, ...]
    """Of all seeds, nats per token."""


@dataclass(frozen=True)
class ScalingLaw:
    """L = a C^b with C in PFLOP/s-days, and the draws of the bootstrap."""

    a: float
    b: float
    a_interval: Interval
    b_interval: Interval
    max_deviation: float
    """The largest distance of a size from the line, as a share of its loss."""
    log_a: np.ndarray
    """Natural logarithms of a, [draws]."""
    slopes: np.ndarray
    """b, [draws]."""

    def loss(self, flops: float) -> float:
        return float(self.a * (flops / PFLOPS_DAY) ** self.b)

    def loss_interval(self, flops: float) -> Interval:
        return interval(np.exp(self.log_a + self.slopes * np.log(flops / PFLOPS_DAY)))


@dataclass(frozen=True)
class FlopsRatio:
    """Muon's training FLOPs over AdamW's, for the loss that AdamW reaches with `flops`."""

    flops: float
    loss: float
    share: float
    interval: Interval
    is_measured: bool
    """Muon's FLOPs lie between the least and the most that it was trained with; else its law is prolonged, and what is
    read off is 0 or infinite, with the interval from there to what Muon's own sizes show."""


@dataclass(frozen=True)
class Comparison:
    """Both laws and what they say together."""

    laws: dict[str, ScalingLaw]
    shares: tuple[FlopsRatio, ...]
    """At the least FLOPs of the ladder, in the geometric middle, at the most."""
    interpolated: tuple[FlopsRatio, ...]
    """At AdamW's sizes, the smallest first, between Muon's neighbouring ones; intervals know the seeds alone."""

    @property
    def middle(self) -> FlopsRatio:
        return self.shares[1]


def interval(values: np.ndarray) -> Interval:
    """The central 95% of draws. Infinite draws are counted, not left out."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return float(low), float(high)


def least_squares(log_flops: np.ndarray, log_losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intercept and slope of lines through [..., points]."""
    mean_x, mean_y = log_flops.mean(-1, keepdims=True), log_losses.mean(-1, keepdims=True)
    apart = log_flops - mean_x
    slope = (apart * (log_losses - mean_y)).sum(-1) / (apart**2).sum(-1)
    return mean_y[..., 0] - slope * mean_x[..., 0], slope


def compare(cells: Mapping[str, Mapping[str, SizeLosses]], draws: int = DRAWS, seed: int = 0) -> Comparison:
    """Fit the law of each optimizer, and compare them.

    Args:
        cells: by optimizer ("muon", "adamw") and size.

    Raises:
        UserError: an optimizer has fewer sizes than the fit needs, or its loss does not fall with FLOPs.
    """
    for name, own in cells.items():
        if len(own) < MIN_SIZES:
            raise UserError(
                f"{name} has results at {len(own)} sizes ({', '.join(own) or 'none'}): a fit needs at least {MIN_SIZES}"
            )
        if len({cell.flops for cell in own.values()}) < MIN_SIZES:
            raise UserError(f"{name} has results at fewer than {MIN_SIZES} different FLOPs: a fit needs as many")
    generator = np.random.default_rng(seed)
    sizes = sorted(set().union(*cells.values()))
    laws = _laws(cells, sizes, _draw_sizes(cells, sizes, draws, generator), generator)
    for name, law in laws.items():
        if law.b >= 0:
            raise UserError(
                f"{name}: the loss does not fall with FLOPs over these sizes (L = {law.a:.4g} C^{law.b:+.4f}), so "
                "there is no loss that both reach: give larger sizes more tokens, or add sizes"
            )
    common = [[cell.flops for cell in own.values()] for own in cells.values()]
    low, high = max(map(min, common)), min(map(max, common))
    muon = [cell.flops for cell in cells["muon"].values()]
    ends = (min(muon), max(muon))
    shares = tuple(_share(laws["muon"], laws["adamw"], flops, ends) for flops in (low, (low * high) ** 0.5, high))
    return Comparison(laws, shares, _read_off(cells, draws, generator))


def _draw_sizes(
    cells: Mapping[str, Mapping[str, SizeLosses]], sizes: Sequence[str], draws: int, generator: np.random.Generator
) -> np.ndarray:
    """Numbers of sizes, int [draws, sizes]; those from which no line can be drawn for both optimizers come again."""
    drawn = generator.integers(len(sizes), size=(draws, len(sizes)))
    while True:
        bad = np.zeros(draws, dtype=bool)
        for own in cells.values():
            flops = np.array([own[size].flops if size in own else np.nan for size in sizes])[drawn]
            bad |= ~(np.nanmax(np.c_[flops, [-1.0] * draws], -1) > np.nanmin(np.c_[flops, [np.inf] * draws], -1))
        if not bad.any():
            return drawn
        drawn[bad] = generator.integers(len(sizes), size=(int(bad.sum()), len(sizes)))


def _laws(
    cells: Mapping[str, Mapping[str, SizeLosses]],
    sizes: Sequence[str],
    drawn: np.ndarray,
    generator: np.random.Generator,
) -> dict[str, ScalingLaw]:
    laws = {}
    for name, own in cells.items():
        x = np.log([cell.flops / PFLOPS_DAY for cell in own.values()])
        y = np.log([np.mean(cell.losses) for cell in own.values()])
        log_a, b = least_squares(x, y)
        farthest = float(np.expm1(np.abs(y - log_a - b * x).max()))
        # Every time that a size is drawn its seeds are drawn anew, [draws, sizes]; NaN: a size that is not there.
        some_x, some_y = np.full(drawn.shape, np.nan), np.full(drawn.shape, np.nan)
        for index, size in enumerate(sizes):
            if size in own:
                here = drawn == index
                values = np.array(own[size].losses)
                picked = values[generator.integers(len(values), size=(int(here.sum()), len(values)))]
                some_x[here], some_y[here] = np.log(own[size].flops / PFLOPS_DAY), np.log(picked.mean(-1))
        many_a, many_b = _masked_least_squares(some_x, some_y)
        intervals = interval(np.exp(many_a)), interval(many_b)
        laws[name] = ScalingLaw(float(np.exp(log_a)), float(b), *intervals, farthest, many_a, many_b)
    return laws


def _masked_least_squares(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `least_squares`, of [draws, points] with NaN where there is no point."""
    if not np.isnan(x).any():
        return least_squares(x, y)
    mean_x, mean_y = np.nanmean(x, -1, keepdims=True), np.nanmean(y, -1, keepdims=True)
    slope = np.nansum((x - mean_x) * (y - mean_y), -1) / np.nansum((x - mean_x) ** 2, -1)
    return mean_y[:, 0] - slope * mean_x[:, 0], slope


def _share(muon: ScalingLaw, adamw: ScalingLaw, flops: float, ends: Interval) -> FlopsRatio:
    """At the loss of AdamW's line; in every draw, of that draw's line. Muon was trained with FLOPs between `ends`."""
    log_c = np.log(flops / PFLOPS_DAY)

    def share(muon_a: np.ndarray, muon_b: np.ndarray, adamw_a: np.ndarray, adamw_b: np.ndarray) -> np.ndarray:
        log_loss = adamw_a + adamw_b * log_c
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            found = np.exp((log_loss - muon_a) / muon_b - log_c)
        return np.where(muon_b < 0, found, np.inf)  # a line that does not fall never gets there

    point = float(share(*(np.array(value) for value in (np.log(muon.a), muon.b, np.log(adamw.a), adamw.b))))
    many = share(muon.log_a, muon.slopes, adamw.log_a, adamw.slopes)
    is_measured = 0.999 * ends[0] <= point * flops <= 1.001 * ends[1]
    return FlopsRatio(flops, adamw.loss(flops), point, interval(many), is_measured)


def _read_off(
    cells: Mapping[str, Mapping[str, SizeLosses]], draws: int, generator: np.random.Generator
) -> tuple[FlopsRatio, ...]:
    """For AdamW's loss at each size, log C between the neighbouring sizes of Muon, log L in a line between them."""
    muon = sorted(cells["muon"].values(), key=lambda cell: cell.flops)
    x = np.log([cell.flops for cell in muon])
    y = np.log([np.mean(cell.losses) for cell in muon])
    drawn_y = np.stack([_drawn_means(cell, draws, generator) for cell in muon], -1)
    found = []
    for cell in sorted(cells["adamw"].values(), key=lambda cell: cell.flops):
        loss = float(np.mean(cell.losses))
        share = float(np.exp(_crossing(x, y, np.log(loss)) - np.log(cell.flops)))
        many = np.exp(_crossing(x, drawn_y, _drawn_means(cell, draws, generator)) - np.log(cell.flops))
        is_measured = 0 < share < np.inf
        least, most = np.exp(x[[0, -1]] - np.log(cell.flops))
        known = interval(many) if is_measured else (0.0, float(least)) if share == 0 else (float(most), np.inf)
        found.append(FlopsRatio(cell.flops, loss, share, known, is_measured))
    return tuple(found)


def _drawn_means(cell: SizeLosses, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Logarithms of mean losses of seeds drawn with replacement, [draws]."""
    values = np.array(cell.losses)
    return np.log(values[generator.integers(len(values), size=(draws, len(values)))].mean(-1))


def _crossing(x: np.ndarray, y: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least x at which the lines through [points] and [..., points] have come down to `target`.

    Minus infinity where the first point is below it already, infinity where none is.
    """
    found = np.full(np.shape(target), np.inf)
    for number in reversed(range(len(x) - 1)):
        before, after = y[..., number], y[..., number + 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            here = x[number] + (x[number + 1] - x[number]) * (before - target) / (before - after)
        found = np.where((after <= target) & (target <= before) & (after < before), here, found)
    return np.where(target > y[..., 0], -np.inf, found)
