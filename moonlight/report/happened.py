"""Events of a run as a short list: consecutive events of one kind become one line."""

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from moonlight.report.history import RunHistory
from moonlight.report.metrics import finite
from moonlight.report.words import format_number, format_time

MAX_LINES = 40
_SAVES = {"saving", "saved"}
_MAX_TEXT = 400
"""Maximum number of characters of a line."""


@dataclass(frozen=True)
class EventLine:
    """One line of the list of events, as text."""

    kind: str
    when: str
    steps: str
    text: str


def event_lines(history: RunHistory) -> list[EventLine]:
    """Return the lines, oldest first. Beyond MAX_LINES, one line counts the events in the middle."""
    listed = [event for event in history.events if event["event"] not in _SAVES]
    groups = [
        (kind, list(events))
        for kind, events in groupby(_with_stages(history, listed), key=lambda event: event["event"])
    ]
    lines = [_line(kind, events) for kind, events in groups]
    if len(lines) > MAX_LINES:
        half = MAX_LINES // 2
        omitted = Counter[str]()
        for kind, events in groups[half:-half]:
            omitted[kind] += len(events)
        counted = ", ".join(f"{count:,} × {kind}" for kind, count in omitted.most_common())
        lines = [
            *lines[:half],
            EventLine("between", "", "", f"{len(lines) - 2 * half} more: {counted}"),
            *lines[-half:],
        ]
    if saved := sum(event["event"] == "saved" for event in history.events):
        lines.append(EventLine("saved", "", "", f"{saved:,} checkpoint{'s' * (saved > 1)} saved in total"))
    metrics = history.metrics
    if metrics and metrics.skipped and not any(event["event"] == "skipped" for event in listed):
        count = int(finite(metrics.last.get("optim/skipped_steps")) or 0) or len(metrics.skipped)
        text = f"{count:,} skipped or not finite, according to the metrics"
        lines.append(EventLine("skipped", "", _steps(metrics.skipped[0], metrics.skipped[-1]), text))
    return lines


def marks(history: RunHistory) -> dict[str, list[Any]]:
    """Return the steps that the charts mark, by kind: at most one per kind and bucket. A stage is (step, name)."""
    steps_by_kind: dict[str, list[Any]] = {"stage": [], "restart": [], "spike": [], "rollback": [], "skipped": []}
    if history.metrics is None:
        return steps_by_kind
    grid = history.metrics.grid
    names = {"resumed": "restart", "spike": "spike", "rolled back": "rollback"}
    seen = set()
    for event in history.events:
        kind = names.get(event["event"])
        step = finite(event.get("step"))
        if kind is None or step is None:
            continue
        bucket = (kind, (int(step) - grid.first) // grid.width)
        if bucket not in seen:
            seen.add(bucket)
            steps_by_kind[kind].append(int(step))
    steps_by_kind["skipped"] = history.metrics.skipped
    steps_by_kind["stage"] = history.metrics.stages
    return steps_by_kind


def _with_stages(history: RunHistory, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events, with each stage inserted before the first event at or after its first step."""
    stages = list(history.metrics.stages) if history.metrics else []
    merged: list[dict[str, Any]] = []
    for event in events:
        while stages and stages[0][0] <= (finite(event.get("step")) or 0):
            step, name = stages.pop(0)
            merged.append({"event": "stage", "step": step, "stage": name})
        merged.append(event)
    return merged + [{"event": "stage", "step": step, "stage": name} for step, name in stages]


def _line(kind: str, events: list[dict[str, Any]]) -> EventLine:
    """Return the line of consecutive events of one kind."""
    steps = [int(step) for event in events if (step := finite(event.get("step"))) is not None]
    text = _text(kind, events[-1])
    if len(events) > 1:
        if kind in ("spike", "skipped"):
            losses = [loss for event in events if (loss := finite(event.get("loss"))) is not None]
            highest = f", highest loss {format_number(max(losses), 4)}" if losses else ""
            text = f"{len(events):,} {'loss spikes' if kind == 'spike' else 'steps skipped'}{highest}"
        elif kind == "stage":
            text = "; ".join(f"{event['stage']} from step {event['step']:,}" for event in events)
            text = f"stages: {text}"
        else:
            text = f"{len(events):,} times; last: {text}"
    text = text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} …"
    return EventLine(kind, format_time(events[0].get("time")), _steps(min(steps), max(steps)) if steps else "", text)


def _steps(first: int, last: int) -> str:
    return f"step {first:,}" if first == last else f"steps {first:,}–{last:,}"


def _text(kind: str, event: dict[str, Any]) -> str:
    """Describe one event."""
    get = event.get
    where = f"on {get('host', 'an unknown host')}, {get('world_size', '?')} processes"
    changed = get("changed")
    texts = {
        "started": f"started {where}",
        "resumed": f"resumed after step {get('step', '?')} {where}{_restart(get('restart'))}",
        "forced": f"settings changed: {'; '.join(map(str, changed)) if isinstance(changed, list) else changed}",
        "spike": f"loss spike, loss {_number(get('loss'))}, score {_number(get('score'))}",
        "rolled back": f"rolled back to this step because of the spike at step {get('spike', '?')}; "
        f"{get('passed_over_sequences', '?')} sequences skipped in total",
        "skipped": f"step skipped, loss {get('loss', '?')}, gradient norm {get('gradient_norm', '?')}",
        "signal": f"signal {get('signal', '?')}",
        "stage": f"stage {get('stage', '?')} starts",
        "stopped": "stopped",
        "finished": "finished",
    }
    return texts.get(kind) or str(get("text") or kind)


def _restart(number: Any) -> str:
    """Return the number of the automatic restart, as text to append; empty if a user started the run."""
    return f", restart {number} of its launcher" if number else ""


def _number(value: Any) -> str:
    return "not finite" if (number := finite(value)) is None else f"{number:.4g}"
