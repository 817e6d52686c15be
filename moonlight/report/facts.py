"""The figures and tables of a page: what a run came to, on what, and how the recipes of several differ."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from moonlight.plan.flops import count_parameters
from moonlight.report.history import RunHistory
from moonlight.report.metrics import RECENT, RunMetrics, finite
from moonlight.report.words import duration, flatten_items, format_number, format_time

MAX_ROWS = 400
"""Of any table."""


@dataclass(frozen=True)
class SummaryFigure:
    """One figure of a run."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class TextTable:
    """Rows of text; the first cell of each names it."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def state(history: RunHistory) -> tuple[str, str]:
    """In a word, and in a sentence if there is more to say."""
    metrics, total = history.metrics, history.total_steps
    if metrics is None:
        return "no step finished yet", "There is a recipe, but metrics.jsonl has no whole line."
    step = metrics.last["step"]
    decisive = [event for event in history.events if event["event"] in ("started", "resumed", "stopped", "finished")]
    newest = decisive[-1]["event"] if decisive else ""
    if newest == "finished" or (total is not None and step >= total):
        return "finished", ""
    if newest == "stopped":
        return "stopped", f"It saved and stopped after step {step:,}; the same command goes on."
    return (
        "in progress or interrupted",
        f"It has not said that it finished, and not all steps are done. This page goes up to step {step:,}, the last "
        f"complete line of metrics.jsonl, which was written {format_time(history.written)}.",
    )


def summary_figures(history: RunHistory) -> list[SummaryFigure]:
    """The figures at the top of the page."""
    found = [SummaryFigure("state", state(history)[0])]
    total = history.total_steps
    metrics = history.metrics
    if metrics is None:
        return [*found, SummaryFigure("steps", f"0 of {total:,}" if total else "0")]
    step, last = metrics.last["step"], metrics.last
    share = f"{step / total:.0%} of {total:,}" if total else "of an unknown number"
    found.append(SummaryFigure("steps", f"{step:,}", share))
    tokens = finite(last.get("consumed_tokens"))
    found.append(SummaryFigure("tokens", format_number(tokens), f"{tokens:,.0f}" if tokens is not None else ""))
    found.append(SummaryFigure("time in steps", duration(metrics.seconds), _wall_time(history)))
    if metrics.seconds:
        found.append(
            SummaryFigure(
                "speed", f"{format_number(metrics.timed_tokens / metrics.seconds)} tokens/s", _utilisation(metrics)
            )
        )
    many = min(RECENT, metrics.num_steps)
    found.append(
        SummaryFigure("training loss", format_number(metrics.recent_loss, 4), f"mean of the last {many} steps")
    )
    for key, label in (
        ("loss/validation", "validation loss"),
        ("loss/held_out", "held-out loss"),
        ("bits_per_byte/held_out", "bits per byte"),
    ):
        if key in metrics.points and (newest := metrics.points[key].last) is not None:
            found.append(
                SummaryFigure(label, format_number(newest[1], 4), f"after step {newest[0]:,}{_held_out(history, key)}")
            )
    found.append(_troubles(history, metrics))
    if history.run is not None:
        counts = count_parameters(history.run.model)
        note = f"{format_number(counts.activated)} active, without embedding and head"
        found.append(SummaryFigure("parameters", format_number(counts.total, 4), note))
    return found


def _held_out(history: RunHistory, key: str) -> str:
    """How much of the held-out text a figure is of."""
    if key != "loss/validation":
        return ", all held-out text"
    most = history.run.train.validation_sequences if history.run else 0
    return f", first {most:,} held-out sequences" if most else ""


def _wall_time(history: RunHistory) -> str:
    times = [time for event in history.events if (time := finite(event.get("time"))) is not None]
    if not times:
        return ""
    end = max(*times, history.written) if state(history)[0] not in ("finished", "stopped") else max(times)
    return f"{duration(max(0.0, end - min(times)))} from the first start on"


def _utilisation(metrics: RunMetrics) -> str:
    parts = []
    if "speed/model_tflops" in metrics.series and (tflops := metrics.series["speed/model_tflops"].mean()) is not None:
        parts.append(f"{format_number(tflops)} TFLOP/s a process")
    if "speed/mfu" in metrics.series and (mfu := metrics.series["speed/mfu"].mean()) is not None:
        parts.append(f"MFU {mfu:.1%}")
    return ", ".join(parts)


def _troubles(history: RunHistory, metrics: RunMetrics) -> SummaryFigure:
    """Restarts, spikes and skipped steps."""

    def count(name: str) -> int:
        return sum(event["event"] == name for event in history.events)

    skipped = int(finite(metrics.last.get("optim/skipped_steps")) or 0)
    numbers = {"rollback": count("rolled back"), "spike": count("spike"), "skipped step": skipped}
    parts = [f"{number:,} {name}{'s' * (number != 1)}" for name, number in numbers.items() if number]
    if metrics.num_not_finite:
        parts.append(f"{metrics.num_not_finite:,} not finite")
    return SummaryFigure("restarts", f"{count('resumed'):,}", ", ".join(parts))


def evaluation(histories: Sequence[RunHistory]) -> TextTable | None:
    """Losses on text that was not trained on, and whatever evaluation.json holds."""
    rows: list[dict[str, str]] = []
    for history in histories:
        row: dict[str, str] = {}
        points = history.metrics.points if history.metrics else {}
        for key in ("loss/held_out", "bits_per_byte/held_out", *sorted(k for k in points if "validation" in k)):
            if key in points and (newest := points[key].last) is not None:
                row[key] = f"{newest[1]:.4f} (step {newest[0]:,})"
        row |= {f"evaluation.json: {key}": value for key, value in flatten_items(history.evaluation) if key}
        rows.append(row)
    return _side_by_side(histories, rows, "on text not trained on")


def environment(histories: Sequence[RunHistory]) -> TextTable | None:
    """What the newest start of each run said of hosts, layout, versions and hardware."""
    rows: list[dict[str, str]] = []
    for history in histories:
        starts = [event for event in history.events if event["event"] in ("started", "resumed")]
        row: dict[str, str] = {}
        if starts:
            newest = starts[-1]
            row = {"newest start": format_time(newest.get("time"))}
            row |= {
                key if name == "" else f"{name}{key}": value
                for name, part in (("", _pick(newest, "host", "world_size")), ("layout: ", newest.get("layout")))
                for key, value in (flatten_items(part) if part else [])
            }
            environments = [event.get("environment") for event in starts]
            if environments[-1]:
                row |= dict(flatten_items(environments[-1]))
            if any(other != environments[-1] for other in environments):
                row["earlier starts"] = "some had another environment"
        rows.append(row)
    return _side_by_side(histories, rows, "environment")


def data_read(histories: Sequence[RunHistory]) -> TextTable | None:
    """Tokens of each source, and its share."""
    rows: list[dict[str, str]] = []
    for history in histories:
        points = history.metrics.points if history.metrics else {}
        read = {
            key.removeprefix("data/tokens/"): it.last[1]
            for key, it in points.items()
            if key.startswith("data/tokens/") and it.last is not None
        }
        total = sum(read.values())
        rows.append({name: f"{format_number(count)} ({count / total:.1%})" for name, count in read.items() if total})
    return _side_by_side(histories, rows, "tokens read of source")


def recipe_differences(histories: Sequence[RunHistory]) -> TextTable | None:
    """Settings in which the recipes are not the same."""
    rows = [dict(islice(flatten_items(history.recipe), MAX_ROWS)) if history.recipe else {} for history in histories]
    known = [row for row in rows if row]
    keys = dict.fromkeys(key for row in known for key in row if key != "name")
    differing = [key for key in keys if len({row.get(key, "–") for row in known}) > 1]
    return _side_by_side(histories, [{key: row.get(key, "–") for key in differing} for row in rows], "setting")


def _side_by_side(histories: Sequence[RunHistory], rows: Sequence[dict[str, str]], corner: str) -> TextTable | None:
    """One column for each run; None without any row."""
    keys: Iterable[str] = dict.fromkeys(key for row in rows for key in row)
    found = [(key, *(row.get(key, "–") for row in rows)) for key in islice(keys, MAX_ROWS)]
    head = (corner, *(history.name for history in histories)) if len(histories) > 1 else (corner, "")
    return TextTable(head, found) if found else None


def _pick(tree: dict[str, object], *keys: str) -> dict[str, object]:
    return {key: tree[key] for key in keys if key in tree}
