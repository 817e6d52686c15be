"""Plots of a scaling ladder, written atomically, with one color for each optimizer."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from moonlight.files import write_figure
from moonlight.placement.param_groups import MATRIX_GROUPS
from moonlight.studies.fit import PFLOPS_DAY, Comparison, SizeLosses

if TYPE_CHECKING:
    from moonlight.studies.spectra import Pair

COLORS = {"muon": "#1f6fb4", "adamw": "#d1495b"}
LABELS = {"muon": "Muon", "adamw": "AdamW"}
DPI = 120


def new_figure(columns: int, height: float = 4.2) -> tuple[Any, Any]:
    """Return a figure 1,320 pixels wide, and `columns` axes side by side. `height` is in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(11, height), dpi=DPI, layout="constrained", squeeze=False)
    for column in axes[0]:
        column.spines[["top", "right"]].set_visible(False)
        column.grid(alpha=0.25, which="both")
    return figure, axes[0]


def mark_rates(axes: Any, rates: Iterable[float], label: str = "learning rate") -> None:
    """Give the x axis one labeled tick for each learning rate or other number. It is logarithmic if all are above 0."""
    ticks = sorted(rates)
    if all(rate > 0 for rate in ticks):
        axes.set_xscale("log")
        axes.set_xticks([], minor=True)
    axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
    axes.set_xlabel(label)


def _share_loss_range(columns: Sequence[Any]) -> None:
    """Give all axes the same y limits."""
    limits = [axes.get_ylim() for axes in columns]
    for axes in columns:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def draw_laws(ladders: Mapping[str, tuple[Mapping[str, Mapping[str, SizeLosses]], Comparison]], out: Path) -> None:
    """Draw the paper's figure, one plot per ladder: loss over training FLOPs of both optimizers, with fitted laws."""
    figure, columns = new_figure(len(ladders), height=5.2)
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, MaxNLocator, NullLocator

    for axes, (ladder, (size_losses, comparison)) in zip(columns, ladders.items(), strict=True):
        for name, law in comparison.laws.items():
            points = sorted((entry.flops, entry.losses) for entry in size_losses[name].values())
            flops = np.geomspace(points[0][0] / 1.3, points[-1][0] * 1.3, 50)
            pflops_days = flops / PFLOPS_DAY
            label = f"{LABELS[name]}: {law.a:.3f} C^{law.b:.4f}"
            axes.plot(pflops_days, [law.loss(c) for c in flops], color=COLORS[name], label=label)
            low, high = zip(*(law.loss_interval(c) for c in flops), strict=True)
            axes.fill_between(pflops_days, low, high, color=COLORS[name], alpha=0.12, linewidth=0)
            for c, losses in points:
                axes.plot([c / PFLOPS_DAY] * len(losses), losses, "o", color=COLORS[name], markersize=4)
        middle = comparison.middle
        low_ratio, high_ratio = middle.interval
        text = f"{middle.ratio:.2f} of AdamW's FLOPs, 95% from {low_ratio:.2f} to {high_ratio:.2f}"
        arrow_tip = (middle.ratio * middle.flops / PFLOPS_DAY, middle.loss)
        axes.annotate("", arrow_tip, (middle.flops / PFLOPS_DAY, middle.loss), arrowprops={"arrowstyle": "->"})
        axes.text(0.02, 0.03, text, transform=axes.transAxes)
        axes.set(xscale="log", yscale="log", xlabel="training FLOPs of the model (PFLOP/s-days)", title=ladder)
        axes.set_ylabel("held-out loss (nats per token)")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(math.inf, math.inf)))
        axes.yaxis.set_major_locator(MaxNLocator(8))
        axes.yaxis.set_major_formatter("{x:.2f}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        axes.legend(frameon=False)
    _share_loss_range(columns)
    write_figure(out, figure)


def draw_grid(sizes: Mapping[str, Mapping[str, Mapping[float, float]]], out: Path) -> None:
    """Draw loss over learning rate at every size, without runs that diverged.

    `sizes` holds losses by size, optimizer and rate.
    """
    figure, columns = new_figure(2)
    for axes, name in zip(columns, LABELS, strict=True):
        for index, (size, values) in enumerate(sizes.items()):
            losses = {rate: loss for rate, loss in sorted(values[name].items()) if math.isfinite(loss)}
            if losses:
                shade = 0.35 + 0.65 * (index + 1) / len(sizes)
                axes.plot(list(losses), list(losses.values()), "o-", markersize=3, color=COLORS[name], alpha=shade)
                axes.annotate(f" {size}", (max(losses), losses[max(losses)]), fontsize=8)
                best = min(losses, key=lambda rate: losses[rate])
                axes.plot(best, losses[best], "o", markersize=8, markerfacecolor="none", color=COLORS[name])
        mark_rates(axes, {rate for values in sizes.values() for rate in values[name]})
        axes.set(ylabel="held-out loss (nats per token)", title=LABELS[name])
    _share_loss_range(columns)
    write_figure(out, figure)


def draw_entropies(pairs: Sequence["Pair"], out: Path) -> None:
    """Draw the paper's figure: SVD entropy by group of matrices, a small dot for each size, a diamond for all."""
    figure, (axes,) = new_figure(1)
    groups = [name for name in MATRIX_GROUPS if any(pair.group == name for pair in pairs)]
    for shift, name in ((-0.12, "muon"), (0.12, "adamw")):
        for index, group in enumerate(groups):
            by_size: dict[str, list[float]] = {}
            for pair in pairs:
                if pair.group == group:
                    by_size.setdefault(pair.size, []).append(getattr(pair, name))
            means = [fmean(values) for values in by_size.values()]
            axes.plot([index + 1.8 * shift] * len(means), means, "o", markersize=4, alpha=0.45, color=COLORS[name])
            mean = fmean(value for values in by_size.values() for value in values)
            label = LABELS[name] if index == 0 else None
            axes.plot(index + shift, mean, "D", markersize=9, color=COLORS[name], label=label)
    axes.set_xticks(range(len(groups)), [group.replace("_", " ") for group in groups])
    axes.set(xlim=(-0.5, len(groups) - 0.5), ylabel="SVD entropy of the weights, mean")
    axes.legend(frameon=False)
    write_figure(out, figure)
