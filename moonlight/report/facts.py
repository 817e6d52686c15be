"""Summary numbers and tables of a report page: results, environment, data, and differences between recipes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from moonlight.plan.flops import count_parameters
from moonlight.report.history import RunHistory
from moonlight.report.metrics import RECENT, RunMetrics, finite
from moonlight.report.words import duration, flatten_items, format_number, format_time

MAX_ROWS = 400
"""Maximum number of rows of a table."""


@dataclass(frozen=True)
class SummaryFigure:
    """One number of a run, as text: its label, its value and a note below it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class TextTable:
    """A table of text; the first cell of each row is its name."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def state(history: RunHistory) -> tuple[str, str]:
    """Return the state of a run in a few words, and a sentence that explains it, or an empty string."""
    metrics, total = history.metrics, history.total_steps
    if metrics is None:
        return "no step finished yet", "The folder has a recipe, but metrics.jsonl has no complete line."
    step = metrics.last["step"]
    decisive = [event for event in history.events if event["event"] in ("started", "resumed", "stopped", "finished")]
    newest = decisive[-1]["event"] if decisive else ""
    if newest == "finished" or (total is not None and step >= total):
        return "finished", ""
    if newest == "stopped":
        return "stopped", f"It saved and stopped after step {step:,}; rerun the command to resume."
    return (
        "in progress or interrupted",
        f"The run recorded no end, and steps are missing. This page ends at step {step:,}, the last complete line of "
        f"metrics.jsonl, which was last written {format_time(history.written)}.",
    )


def summary_figures(history: RunHistory) -> list[SummaryFigure]:
    """Return the numbers at the top of the page."""
    figures = [SummaryFigure("state", state(history)[0])]
    total = history.total_steps
    metrics = history.metrics
    if metrics is None:
        return [*figures, SummaryFigure("steps", f"0 of {total:,}" if total else "0")]
    step, last = metrics.last["step"], metrics.last
    fraction = f"{step / total:.0%} of {total:,}" if total else "of an unknown number"
    figures.append(SummaryFigure("steps", f"{step:,}", fraction))
    tokens = finite(last.get("consumed_tokens"))
    figures.append(SummaryFigure("tokens", format_number(tokens), f"{tokens:,.0f}" if tokens is not None else ""))
    figures.append(SummaryFigure("time in steps", duration(metrics.seconds), _wall_time(history)))
    if metrics.seconds:
        speed = f"{format_number(metrics.timed_tokens / metrics.seconds)} tokens/s"
        figures.append(SummaryFigure("speed", speed, _utilization(metrics)))
    num_recent = min(RECENT, metrics.num_steps)
    figures.append(
        SummaryFigure("training loss", format_number(metrics.recent_loss, 4), f"mean of the last {num_recent} steps")
    )
    for key, label in (
        ("loss/validation", "validation loss"),
        ("loss/held_out", "held-out loss"),
        ("bits_per_byte/held_out", "bits per byte"),
    ):
        if key in metrics.points and (newest := metrics.points[key].last) is not None:
            note = f"after step {newest[0]:,}{_held_out_scope(history, key)}"
            figures.append(SummaryFigure(label, format_number(newest[1], 4), note))
    figures.append(_restarts(history, metrics))
    if history.config is not None:
        counts = count_parameters(history.config.model)
        note = f"{format_number(counts.activated)} active without embedding and head"
        figures.append(SummaryFigure("parameters", format_number(counts.total, 4), note))
    return figures


def _held_out_scope(history: RunHistory, key: str) -> str:
    """Return the part of the held-out text that the loss `key` covers, as text to append."""
    if key != "loss/validation":
        return ", all held-out text"
    num_sequences = history.config.train.validation_sequences if history.config else 0
    return f", first {num_sequences:,} held-out sequences" if num_sequences else ""


def _wall_time(history: RunHistory) -> str:
    times = [time for event in history.events if (time := finite(event.get("time"))) is not None]
    if not times:
        return ""
    end = max(*times, history.written) if state(history)[0] not in ("finished", "stopped") else max(times)
    return f"{duration(max(0.0, end - min(times)))} since the first start"


def _utilization(metrics: RunMetrics) -> str:
    parts = []
    if "speed/model_tflops" in metrics.series and (tflops := metrics.series["speed/model_tflops"].mean()) is not None:
        parts.append(f"{format_number(tflops)} TFLOP/s per process")
    if "speed/mfu" in metrics.series and (mfu := metrics.series["speed/mfu"].mean()) is not None:
        parts.append(f"MFU {mfu:.1%}")
    return ", ".join(parts)


def _restarts(history: RunHistory, metrics: RunMetrics) -> SummaryFigure:
    """Count restarts; the note counts rollbacks, spikes, skipped steps and losses that are not finite."""

    def count(name: str) -> int:
        return sum(event["event"] == name for event in history.events)

    skipped = int(finite(metrics.last.get("optim/skipped_steps")) or 0)
    numbers = {"rollback": count("rolled back"), "spike": count("spike"), "skipped step": skipped}
    parts = [f"{number:,} {name}{'s' * (number != 1)}" for name, number in numbers.items() if number]
    if metrics.num_not_finite:
        parts.append(f"{metrics.num_not_finite:,} not finite")
    return SummaryFigure("restarts", f"{count('resumed'):,}", ", ".join(parts))


def evaluation(histories: Sequence[RunHistory]) -> TextTable | None:
    """Return losses on held-out text, and the content of each evaluation.json; None without either."""
    rows: list[dict[str, str]] = []
    for history in histories:
        row: dict[str, str] = {}
        points = history.metrics.points if history.metrics else {}
        for key in ("loss/held_out", "bits_per_byte/held_out", *sorted(k for k in points if "validation" in k)):
            if key in points and (newest := points[key].last) is not None:
                row[key] = f"{newest[1]:.4f} (step {newest[0]:,})"
        row |= {f"evaluation.json: {key}": value for key, value in flatten_items(history.evaluation) if key}
        rows.append(row)
    return _side_by_side(histories, rows, "held-out text")


def environment(histories: Sequence[RunHistory]) -> TextTable | None:
    """Return host, layout, versions and hardware of the newest start of each run; None without a start."""
    rows: list[dict[str, str]] = []
    for history in histories:
        starts = [event for event in history.events if event["event"] in ("started", "resumed")]
        row: dict[str, str] = {}
        if starts:
            newest = starts[-1]
            row = {"newest start": format_time(newest.get("time"))}
            if machine := {key: newest[key] for key in ("host", "world_size") if key in newest}:
                row |= dict(flatten_items(machine))
            if newest.get("layout"):
                row |= {f"layout: {key}": value for key, value in flatten_items(newest["layout"])}
            environments = [event.get("environment") for event in starts]
            if environments[-1]:
                row |= dict(flatten_items(environments[-1]))
            if any(other != environments[-1] for other in environments):
                row["earlier starts"] = "some had a different environment"
        rows.append(row)
    return _side_by_side(histories, rows, "environment")


def data_read(histories: Sequence[RunHistory]) -> TextTable | None:
    """Return the tokens read from each source, and its fraction of all; None if not recorded."""
    rows: list[dict[str, str]] = []
    for history in histories:
        points = history.metrics.points if history.metrics else {}
        token_counts = {
            key.removeprefix("data/tokens/"): series.last[1]
            for key, series in points.items()
            if key.startswith("data/tokens/") and series.last is not None
        }
        total = sum(token_counts.values())
        rows.append(
            {name: f"{format_number(count)} ({count / total:.1%})" for name, count in token_counts.items() if total}
        )
    return _side_by_side(histories, rows, "tokens read, by source")


def recipe_differences(histories: Sequence[RunHistory]) -> TextTable | None:
    """Return the settings that differ between the recipes that can be read; None if all are equal."""
    rows = [dict(islice(flatten_items(history.recipe), MAX_ROWS)) if history.recipe else {} for history in histories]
    readable = [row for row in rows if row]
    keys = dict.fromkeys(key for row in readable for key in row if key != "name")
    differing = [key for key in keys if len({row.get(key, "–") for row in readable}) > 1]
    return _side_by_side(histories, [{key: row.get(key, "–") for key in differing} for row in rows], "setting")


def _side_by_side(histories: Sequence[RunHistory], rows: Sequence[dict[str, str]], corner: str) -> TextTable | None:
    """Return a table with one column per run; None without any row."""
    keys: Iterable[str] = dict.fromkeys(key for row in rows for key in row)
    cells = [(key, *(row.get(key, "–") for row in rows)) for key in islice(keys, MAX_ROWS)]
    head = (corner, *(history.name for history in histories)) if len(histories) > 1 else (corner, "")
    return TextTable(head, cells) if cells else None
