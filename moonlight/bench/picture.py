"""`moonlight bench picture`: the newest figures of every benchmark in one picture."""

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
INCHES_WIDE, INCHES_A_LINE, DPI = 10.0, 0.25, 120
"""1200 pixels wide."""


@dataclass(frozen=True)
class ChartBar:
    """One bar of the picture: how many times better ours is, the peer over ours."""

    benchmark: str
    case: str
    ratio: float
    low: float
    high: float
    bar: float | None
    passed: bool
    own_limit: bool


def newest(folder: Path) -> dict[str, Path]:
    """The newest file of each benchmark in `folder`, by its name.

    Raises:
        UserError: there is none.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json")):  # dates sort as text
        if match := NAME.fullmatch(path.name):
            found[match["benchmark"]] = path
    found = dict(sorted(found.items()))
    if not found:
        raise UserError(f"{folder} holds no <name>-<date>.json: write some with `moonlight bench NAME --json PATH`")
    return found


def chart_bars(benchmark: str, content: dict[str, Any]) -> list[ChartBar]:
    """What the picture shows of one file: everything with a unit. Accuracy, which has none, is a table's matter."""
    lines = []
    for figure in content["figures"]:
        if not figure["unit"]:
            continue
        relation, number, *_ = figure["bar"].split()
        bar: float | None = float(number)
        middle, low, high = (figure["ratio"][name] for name in ("median", "minimum", "maximum"))
        if relation == "<=":  # per cent that ours adds to the peer; its inverse is how many times less it takes
            middle, low, high, bar = (100 / value for value in (middle, high, low, float(number)))
        lines.append(
            ChartBar(benchmark, figure["case"], middle, low, high, bar or None, figure["passed"], figure["own_limit"])
        )
    return lines


def plot_results(folder: Path, out: Path) -> list[Path]:
    """Draw the newest file of every benchmark in `folder` as the picture `out`, and return these files.

    Raises:
        UserError: there is none, one is not such a file, or `out` cannot be written.
    """
    paths = newest(folder)
    lines: list[ChartBar] = []
    for name, path in paths.items():
        try:
            lines += chart_bars(name, json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not what `moonlight bench` writes ({error!r}): remove it") from None
    _draw(lines, out)
    return list(paths.values())


def _draw(lines: list[ChartBar], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter

    # A line for the name of each benchmark above its bars.
    places, headings, place = [], [], 0.0
    for index, line in enumerate(lines):
        if index == 0 or line.benchmark != lines[index - 1].benchmark:
            place += 0.5 * bool(index)
            headings.append((place, line.benchmark))
            place += 1
        places.append(place)
        place += 1
    figure, axes = pyplot.subplots(figsize=(INCHES_WIDE, INCHES_A_LINE * (place + 4)), dpi=DPI, layout="constrained")
    axes.set_xscale("log")
    left, right = 0.5 * min(line.low for line in lines), 2.2 * max(line.high for line in lines)
    axes.set_xlim(min(left, 0.5), right)
    axes.set_ylim(place, -0.8)
    axes.axvline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
    for where, line in zip(places, lines, strict=True):
        color = MISSED_COLOR if not line.passed else LIMIT_COLOR if line.own_limit else PEER_COLOR
        axes.barh(where, line.ratio - 1, left=1, height=0.66, color=color)
        axes.plot([line.low, line.high], [where, where], color=SPREAD_COLOR, linewidth=1.6, solid_capstyle="butt")
        if line.bar is not None:
            axes.plot([line.bar] * 2, [where - 0.42, where + 0.42], color=MARK_COLOR, linewidth=2.2)
        axes.annotate(
            f"{line.ratio:.3g}×",
            (max(line.high, line.ratio, line.bar or 0, 1), where),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    labels = sorted(
        [(where, line.case, "normal") for where, line in zip(places, lines, strict=True)]
        + [(where, heading, "bold") for where, heading in headings]
    )
    axes.set_yticks([where for where, _, _ in labels], [text for _, text, _ in labels], fontsize=8.5)
    for tick, (_, _, weight) in zip(axes.get_yticklabels(), labels, strict=True):
        tick.set_fontweight(weight)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.grid(axis="x", color="#eeeeee", zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    kinds = {
        "times better than the peer (left of 1×: worse)": Patch(color=PEER_COLOR),
        "times better than a limit of ours, or another way of ours": Patch(color=LIMIT_COLOR),
        "bar not met": Patch(color=MISSED_COLOR),
        "the bar": Line2D([], [], color=MARK_COLOR, linewidth=2.2, marker="|", linestyle=""),
        "spread of the rounds": Line2D([], [], color=SPREAD_COLOR, linewidth=1.6),
    }
    figure.legend(kinds.values(), kinds, loc="outside upper left", ncols=2, frameon=False, fontsize=8.5)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_figure(out, figure)
