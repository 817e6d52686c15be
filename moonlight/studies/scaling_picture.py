"""Pictures that appear whole, in the colours of the two optimizers."""

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
    """A figure 1,320 pixels wide, and its axes side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(11, height), dpi=DPI, layout="constrained", squeeze=False)
    for one in axes[0]:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25, which="both")
    return figure, axes[0]


def mark_rates(axes: Any, rates: Iterable[float]) -> None:
    """A logarithmic axis of learning rates, each of them named."""
    shown = sorted(rates)
    axes.set_xscale("log")
    axes.set_xticks(shown, [f"{rate:g}" for rate in shown])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("learning rate")


def draw_laws(ladders: Mapping[str, tuple[Mapping[str, Mapping[str, SizeLosses]], Comparison]], out: Path) -> None:
    """The paper's figure: loss over training FLOPs of both optimizers, with the fitted laws; ladders side by side."""
    figure, every = new_figure(len(ladders), height=5.2)
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, MaxNLocator, NullLocator

    for axes, (ladder, (cells, comparison)) in zip(every, ladders.items(), strict=True):
        for name, law in comparison.laws.items():
            points = sorted((cell.flops, cell.losses) for cell in cells[name].values())
            flops = np.geomspace(points[0][0] / 1.3, points[-1][0] * 1.3, 50)
            line = flops / PFLOPS_DAY
            label = f"{LABELS[name]}: {law.a:.3f} C^{law.b:.4f}"
            axes.plot(line, [law.loss(c) for c in flops], color=COLORS[name], label=label)
            low, high = zip(*(law.loss_interval(c) for c in flops), strict=True)
            axes.fill_between(line, low, high, color=COLORS[name], alpha=0.12, linewidth=0)
            for c, losses in points:
                axes.plot([c / PFLOPS_DAY] * len(losses), losses, "o", color=COLORS[name], markersize=4)
        middle = comparison.middle
        low_share, high_share = middle.interval
        text = f"{middle.share:.2f} of AdamW's FLOPs, 95% from {low_share:.2f} to {high_share:.2f}"
        place = (middle.share * middle.flops / PFLOPS_DAY, middle.loss)
        axes.annotate("", place, (middle.flops / PFLOPS_DAY, middle.loss), arrowprops={"arrowstyle": "->"})
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
    limits = [axes.get_ylim() for axes in every]
    for axes in every:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    write_figure(out, figure)


def draw_grid(sizes: Mapping[str, Mapping[str, Mapping[float, float]]], out: Path) -> None:
    """Loss over learning rate at every size; `sizes` by size, optimizer and rate. Runs that diverged are left out."""
    figure, every = new_figure(2)
    for axes, name in zip(every, LABELS, strict=True):
        for index, (size, values) in enumerate(sizes.items()):
            known = {rate: loss for rate, loss in sorted(values[name].items()) if math.isfinite(loss)}
            if known:
                shade = 0.35 + 0.65 * (index + 1) / len(sizes)
                axes.plot(list(known), list(known.values()), "o-", markersize=3, color=COLORS[name], alpha=shade)
                axes.annotate(f" {size}", (max(known), known[max(known)]), fontsize=8)
                best = min(known, key=lambda rate: known[rate])
                axes.plot(best, known[best], "o", markersize=8, markerfacecolor="none", color=COLORS[name])
        mark_rates(axes, {rate for values in sizes.values() for rate in values[name]})
        axes.set(ylabel="held-out loss (nats per token)", title=LABELS[name])
    limits = [axes.get_ylim() for axes in every]
    for axes in every:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    write_figure(out, figure)


def draw_entropies(pairs: Sequence["Pair"], out: Path) -> None:
    """The paper's figure: SVD entropy by group of matrices; a small dot for each size, a large one for all."""
    figure, (axes,) = new_figure(1)
    groups = [name for name in MATRIX_GROUPS if any(pair.group == name for pair in pairs)]
    for shift, name in ((-0.12, "muon"), (0.12, "adamw")):
        for place, group in enumerate(groups):
            by_size: dict[str, list[float]] = {}
            for pair in pairs:
                if pair.group == group:
                    by_size.setdefault(pair.size, []).append(getattr(pair, name))
            means = [fmean(values) for values in by_size.values()]
            axes.plot([place + 1.8 * shift] * len(means), means, "o", markersize=4, alpha=0.45, color=COLORS[name])
            every = fmean(value for values in by_size.values() for value in values)
            label = LABELS[name] if place == 0 else None
            axes.plot(place + shift, every, "D", markersize=9, color=COLORS[name], label=label)
    axes.set_xticks(range(len(groups)), [group.replace("_", " ") for group in groups])
    axes.set(xlim=(-0.5, len(groups) - 0.5), ylabel="SVD entropy of the weights, mean")
    axes.legend(frameon=False)
    write_figure(out, figure)
