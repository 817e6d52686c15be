"""`moonlight bench picture`: one plot with the newest results of every benchmark."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moonlight.errors import UserError
from moonlight.files import write_figure

NAME = re.compile(r"(?P<benchmark>.+)-(?P<date>\d{4}-\d{2}-\d{2})\.json")
PEER_COLOR, LIMIT_COLOR, MISSED_COLOR, MARK_COLOR = "#8fbcdb", "#cfcfcf", "#e8a39c", "#3b3b3b"
SPREAD_COLOR = "#4a7ba1"
WIDTH_INCHES, INCHES_PER_LINE, DPI = 10.0, 0.25, 120
"""1200 pixels wide."""


@dataclass(frozen=True)
class ChartBar:
    """One bar of the plot: the ratio of peer to ours with its range over rounds; above 1 is better."""

    benchmark: str
    case: str
    ratio: float
    low: float
    high: float
    bar: float | None
    """Ratio that the result must reach, or None."""
    passed: bool
    own_limit: bool


def newest_files(folder: Path) -> dict[str, Path]:
    """Return the newest file of each benchmark in `folder`, by the benchmark's name.

    Raises:
        UserError: the folder has no results file.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json")):  # dates sort as text
        if match := NAME.fullmatch(path.name):
            files[match["benchmark"]] = path
    if not files:
        raise UserError(f"{folder} holds no <name>-<date>.json: write some with `moonlight bench NAME --json PATH`")
    return dict(sorted(files.items()))


def chart_bars(benchmark: str, content: dict[str, Any]) -> list[ChartBar]:
    """Return the bars of one results file: every result with a unit. Accuracy results have no unit and no bar."""
    bars = []
    for result in content["figures"]:
        if not result["unit"]:
            continue
        relation, number, *_ = result["bar"].split()
        bar: float | None = float(number)
        median, low, high = (result["ratio"][name] for name in ("median", "minimum", "maximum"))
        if relation == "<=":  # percent that ours adds to the peer; the inverse is the factor by which ours is smaller
            median, low, high, bar = (100 / value for value in (median, high, low, float(number)))
        bars.append(
            ChartBar(benchmark, result["case"], median, low, high, bar or None, result["passed"], result["own_limit"])
        )
    return bars


def plot_results(folder: Path, out: Path) -> list[Path]:
    """Plot the newest file of every benchmark in `folder` to the image `out`, and return these files.

    Raises:
        UserError: the folder has no results file, a file is invalid, or `out` cannot be written.
    """
    paths = newest_files(folder)
    bars: list[ChartBar] = []
    for name, path in paths.items():
        try:
            bars += chart_bars(name, json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a results file of `moonlight bench` ({error!r}): remove it") from None
    _draw(bars, out)
    return list(paths.values())


def _draw(bars: list[ChartBar], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter

    # The name of each benchmark takes one line above its bars.
    positions, headings, y = [], [], 0.0
    for index, bar in enumerate(bars):
        if index == 0 or bar.benchmark != bars[index - 1].benchmark:
            y += 0.5 * bool(index)
            headings.append((y, bar.benchmark))
            y += 1
        positions.append(y)
        y += 1
    figure, axes = pyplot.subplots(figsize=(WIDTH_INCHES, INCHES_PER_LINE * (y + 4)), dpi=DPI, layout="constrained")
    axes.set_xscale("log")
    left, right = 0.5 * min(bar.low for bar in bars), 2.2 * max(bar.high for bar in bars)
    axes.set_xlim(min(left, 0.5), right)
    axes.set_ylim(y, -0.8)
    axes.axvline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
    for position, bar in zip(positions, bars, strict=True):
        color = MISSED_COLOR if not bar.passed else LIMIT_COLOR if bar.own_limit else PEER_COLOR
        axes.barh(position, bar.ratio - 1, left=1, height=0.66, color=color)
        axes.plot([bar.low, bar.high], [position, position], color=SPREAD_COLOR, linewidth=1.6, solid_capstyle="butt")
        if bar.bar is not None:
            axes.plot([bar.bar] * 2, [position - 0.42, position + 0.42], color=MARK_COLOR, linewidth=2.2)
        axes.annotate(
            f"{bar.ratio:.3g}×",
            (max(bar.high, bar.ratio, bar.bar or 0, 1), position),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    labels = sorted(
        [(position, bar.case, "normal") for position, bar in zip(positions, bars, strict=True)]
        + [(position, heading, "bold") for position, heading in headings]
    )
    axes.set_yticks([position for position, _, _ in labels], [text for _, text, _ in labels], fontsize=8.5)
    for tick, (_, _, weight) in zip(axes.get_yticklabels(), labels, strict=True):
        tick.set_fontweight(weight)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.grid(axis="x", color="#eeeeee", zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    legend = {
        "times better than the peer (left of 1×: worse)": Patch(color=PEER_COLOR),
        "times better than a limit or another implementation of ours": Patch(color=LIMIT_COLOR),
        "below its bar": Patch(color=MISSED_COLOR),
        "bar": Line2D([], [], color=MARK_COLOR, linewidth=2.2, marker="|", linestyle=""),
        "spread of the rounds": Line2D([], [], color=SPREAD_COLOR, linewidth=1.6),
    }
    figure.legend(legend.values(), legend, loc="outside upper left", ncols=2, frameon=False, fontsize=8.5)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_figure(out, figure)
