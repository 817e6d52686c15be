"""What happened to a run, told in few lines: its events, with those of one kind in a row taken together."""

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
"""Characters of one line."""


@dataclass(frozen=True)
class EventLine:
    """One line of the list."""

    kind: str
    when: str
    steps: str
    text: str


def event_lines(history: RunHistory) -> list[EventLine]:
    """The lines, oldest first; of very many, those in the middle are only counted."""
    told = [event for event in history.events if event["event"] not in _SAVES]
    groups = [(kind, list(those)) for kind, those in groupby(_with_stages(history, told), key=lambda it: it["event"])]
    lines = [_line(kind, those) for kind, those in groups]
    if len(lines) > MAX_LINES:
        half = MAX_LINES // 2
        between = Counter[str]()
        for kind, those in groups[half:-half]:
            between[kind] += len(those)
        counted = ", ".join(f"{count:,} × {kind}" for kind, count in between.most_common())
        lines = [
            *lines[:half],
            EventLine("between", "", "", f"{len(lines) - 2 * half} more: {counted}"),
            *lines[-half:],
        ]
    if saved := sum(event["event"] == "saved" for event in history.events):
        lines.append(EventLine("saved", "", "", f"{saved:,} checkpoint{'s' * (saved > 1)} saved in all"))
    metrics = history.metrics
    if metrics and metrics.skipped and not any(event["event"] == "skipped" for event in told):
        count = int(finite(metrics.last.get("optim/skipped_steps")) or 0) or len(metrics.skipped)
        text = f"{count:,} skipped or not finite, as the metrics tell"
        lines.append(EventLine("skipped", "", _steps(metrics.skipped[0], metrics.skipped[-1]), text))
    return lines


def marks(history: RunHistory) -> dict[str, list[Any]]:
    """What the charts mark: steps by kind, at most one of a kind in each bucket of the charts."""
    found: dict[str, list[Any]] = {"stage": [], "restart": [], "spike": [], "rollback": [], "skipped": []}
    if history.metrics is None:
        return found
    grid = history.metrics.grid
    names = {"resumed": "restart", "spike": "spike", "rolled back": "rollback"}
    seen = set()
    for event in history.events:
        kind = names.get(event["event"])
        step = finite(event.get("step"))
        if kind is None or step is None:
            continue
        place = (kind, (int(step) - grid.first) // grid.width)
        if place not in seen:
            seen.add(place)
            found[kind].append(int(step))
    found["skipped"] = history.metrics.skipped
    found["stage"] = history.metrics.stages
    return found


def _with_stages(history: RunHistory, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events, each stage of the metrics put before the first event at or after its first step."""
    left = list(history.metrics.stages) if history.metrics else []
    found: list[dict[str, Any]] = []
    for event in events:
        while left and left[0][0] <= (finite(event.get("step")) or 0):
            step, name = left.pop(0)
            found.append({"event": "stage", "step": step, "stage": name})
        found.append(event)
    return found + [{"event": "stage", "step": step, "stage": name} for step, name in left]


def _line(kind: str, those: list[dict[str, Any]]) -> EventLine:
    steps = [int(step) for event in those if (step := finite(event.get("step"))) is not None]
    text = _text(kind, those[-1])
    if len(those) > 1:
        if kind in ("spike", "skipped"):
            losses = [loss for event in those if (loss := finite(event.get("loss"))) is not None]
            highest = f", the highest loss {format_number(max(losses), 4)}" if losses else ""
            text = f"{len(those):,} {'loss spikes' if kind == 'spike' else 'steps skipped'}{highest}"
        elif kind == "stage":
            text = "; ".join(f"{event['stage']} from step {event['step']:,}" for event in those)
            text = f"stages: {text}"
        else:
            text = f"{len(those):,} times; the last: {text}"
    text = text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} …"
    return EventLine(kind, format_time(those[0].get("time")), _steps(min(steps), max(steps)) if steps else "", text)


def _steps(first: int, last: int) -> str:
    return f"step {first:,}" if first == last else f"steps {first:,}–{last:,}"


def _text(kind: str, event: dict[str, Any]) -> str:
    """One event in words."""
    get = event.get
    where = f"on {get('host', 'an unknown host')}, {get('world_size', '?')} processes"
    changed = get("changed")
    texts = {
        "started": f"started {where}",
        "resumed": f"went on after step {get('step', '?')} {where}{_restart(get('restart'))}",
        "forced": f"with other settings: {'; '.join(map(str, changed)) if isinstance(changed, list) else changed}",
        "spike": f"loss spike, loss {_number(get('loss'))}, score {_number(get('score'))}",
        "rolled back": f"back to here because of the spike in step {get('spike', '?')}; "
        f"{get('passed_over_sequences', '?')} sequences passed over in all",
        "skipped": f"step skipped, loss {get('loss', '?')}, gradient norm {get('gradient_norm', '?')}",
        "signal": f"signal {get('signal', '?')}",
        "stage": f"stage {get('stage', '?')} begins",
        "stopped": "stopped",
        "finished": "finished",
    }
    return texts.get(kind) or str(get("text") or kind)


def _restart(number: Any) -> str:
    """Whether the launcher did it by itself."""
    return f", restart {number} of its launcher" if number else ""


def _number(value: Any) -> str:
    return "not finite" if (number := finite(value)) is None else f"{number:.4g}"
