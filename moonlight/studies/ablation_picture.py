"""Plot of an ablation: loss over the varied number, or training loss over tokens compared with the baseline."""

from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from moonlight.files import write_figure
from moonlight.studies.ablation import Ablation
from moonlight.studies.ablation_text import Outcomes
from moonlight.studies.measured import Measured
from moonlight.studies.outcome import VariantResult, curve_differences
from moonlight.studies.scaling_picture import mark_rates, new_figure

COLORS = ("#1f6fb4", "#d1495b", "#2e8b57", "#e08e0b", "#7b4fa3", "#5f6b73", "#17a2b8", "#a0522d")
PLOTTED_KINDS = ("attention query", "MLP")
"""Kinds of matrices whose RMS is drawn over the varied number, as in the paper's table."""


def draw_ablation(ablation: Ablation, outcomes: Outcomes, weight_rms: Measured, out: Path) -> None:
    """Write the plot to `out`, without variants whose runs all diverged."""
    figure, (left, right) = new_figure(2)
    plotted = {name: outcome for name, outcome in outcomes.items() if outcome.runs}
    if ablation.numbers:
        _losses_over_numbers(left, ablation, plotted)
        _weights_over_numbers(right, ablation, plotted, weight_rms)
    else:
        colors = dict(zip(outcomes, cycle(COLORS)))
        _curves(left, plotted, colors)
        _differences(right, ablation, plotted, colors)
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    write_figure(out, figure)


def _losses_over_numbers(axes: Any, ablation: Ablation, outcomes: Outcomes) -> None:
    means: dict[float, float] = {}
    line_colors = iter(COLORS[1:])
    for variant, outcome in outcomes.items():
        values = [run.loss for run in outcome.runs.values() if run.loss is not None]
        if (number := ablation.numbers.get(variant)) is None:
            axes.axhline(fmean(values), color=next(line_colors), linestyle="--", label=variant)
        else:
            means[number] = fmean(values)
            axes.plot([number] * len(values), values, "o", color=COLORS[0], markersize=4, alpha=0.6)
    axes.plot(sorted(means), [means[number] for number in sorted(means)], color=COLORS[0], label="mean of seeds")
    mark_rates(axes, ablation.numbers.values(), ablation.varied)
    axes.set_ylabel("held-out loss (nats per token)")


def _weights_over_numbers(axes: Any, ablation: Ablation, outcomes: Outcomes, weight_rms: Measured) -> None:
    for kind, color in zip(PLOTTED_KINDS, COLORS, strict=False):
        means = {
            variant: value for variant, outcome in outcomes.items() if (value := _mean_rms(outcome, weight_rms, kind))
        }
        numbered = [variant for variant in ablation.numbers if variant in means]
        numbers = [ablation.numbers[variant] for variant in numbered]
        axes.plot(numbers, [means[variant] for variant in numbered], "o-", color=color, label=kind)
        for variant in means.keys() - ablation.numbers.keys():
            axes.axhline(means[variant], color=color, linestyle="--", label=f"{kind}, {variant}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    mark_rates(axes, ablation.numbers.values(), ablation.varied)
    axes.set_ylabel("RMS of the weights at the end")


def _mean_rms(outcome: VariantResult, weight_rms: Measured, kind: str) -> float:
    """Return the mean over seeds; 0 if a seed was not measured."""
    values = [weight_rms.get(run.point.name, {}).get(kind, 0.0) for run in outcome.runs.values()]
    return fmean(values) if all(values) else 0.0


def _curves(axes: Any, outcomes: Outcomes, colors: dict[str, str]) -> None:
    late_losses: list[float] = []
    for variant, outcome in outcomes.items():
        for index, run in enumerate(outcome.runs.values()):
            tokens, values = np.array(run.curve).reshape(-1, 2).T
            axes.plot(tokens / 1e6, values, color=colors[variant], lw=1.2, alpha=0.8, label=None if index else variant)
            late_losses += list(values[len(values) // 10 :])
    if late_losses:
        margin = 0.05 * (max(late_losses) - min(late_losses))
        axes.set_ylim(min(late_losses) - margin, max(late_losses) + margin)
    axes.set(xlabel="million tokens", ylabel="training loss (nats per token)")


def _differences(axes: Any, ablation: Ablation, outcomes: Outcomes, colors: dict[str, str]) -> None:
    """Draw mean and range over seeds, without the first tenth of the run, in which differences are large."""
    baseline_runs = outcomes[ablation.baseline].runs if ablation.baseline in outcomes else {}
    for variant, outcome in outcomes.items():
        curves = curve_differences(outcome.runs, baseline_runs)
        if variant == ablation.baseline or not curves:
            continue
        start = len(curves[0][0]) // 10
        tokens = np.divide(curves[0][0][start:], 1e6)
        values = np.array([differences[start:] for _, differences in curves])
        axes.plot(tokens, values.mean(0), color=colors[variant], label=variant)
        axes.fill_between(tokens, values.min(0), values.max(0), color=colors[variant], alpha=0.15, linewidth=0)
    axes.axhline(0.0, color=colors[ablation.baseline], linewidth=1.2)
    axes.set(xlabel="million tokens", ylabel=f"training loss minus that of {ablation.baseline}")
