"""The report page: one HTML file that needs no other file and no network."""

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from string import Template

from moonlight.report.facts import (
    SummaryFigure,
    TextTable,
    data_read,
    environment,
    evaluation,
    recipe_differences,
    state,
    summary_figures,
)
from moonlight.report.happened import EventLine, event_lines, marks
from moonlight.report.history import RunHistory

SCRIPTS = ("data.js", "panel.js", "charts.js", "page.js")
MAX_OPEN = 8
"""Number of newest events shown; earlier ones are collapsed."""
MAX_ROWS = 10
"""Maximum number of differing settings shown; a longer table is collapsed."""
MAX_RECIPE = 200_000
"""Maximum number of characters of a recipe."""


def build(histories: Sequence[RunHistory]) -> str:
    """Return the page as HTML text."""
    names = ", ".join(history.name for history in histories)
    script = "".join(_read_part(name) for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Whatever the files of a run contain, the page fetches nothing and runs only this script.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    page = Template(_read_part("page.html")).substitute(
        policy=policy,
        title=f"{escape(names)} – Moonlight",
        style=_read_part("page.css"),
        body=_body(histories),
        data=_data(histories),
        script=script,
    )
    return page.encode("utf-8", "replace").decode()  # file names may contain bytes that are not text


def _read_part(name: str) -> str:
    return (files("moonlight.report") / name).read_text(encoding="utf-8")


def _data(histories: Sequence[RunHistory]) -> str:
    """Return the data that page.js draws, as JSON that is safe inside a script element."""
    runs = [
        {
            "name": history.name,
            "color": index,
            "firstExpertLayer": history.first_expert_layer,
            "marks": marks(history),
            **history.metrics.for_page(),
        }
        for index, history in enumerate(histories)
        if history.metrics is not None
    ]
    text = json.dumps({"runs": runs}, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _body(histories: Sequence[RunHistory]) -> str:
    several = len(histories) > 1
    title = f"{len(histories)} runs compared" if several else escape(histories[0].name)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts = [f'<header class="top"><p class="over">Moonlight training run{"s" * several}</p><h1>{title}</h1>']
    for index, history in enumerate(histories):
        word, sentence = state(history)
        name = f"<b>{escape(history.name)}</b>: " if several else ""
        swatch = f'<i class="swatch c{index}"></i>' if several else ""
        kind = "done" if word == "finished" else "open"
        parts.append(f'<p class="state">{swatch}{name}<span class="pill {kind}">{word}</span> {escape(sentence)}</p>')
    parts.append("</header><main>")
    if warnings := [warning for history in histories for warning in history.warnings]:
        items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
        parts.append(f'<section class="warnings" aria-label="warnings"><ul>{items}</ul></section>')
    if several:
        parts.append(_section("Summary", _summary_table(histories)))
        same = "<p>The recipes that can be read are equal.</p>"
        parts.append(_differences(recipe_differences(histories), same))
    else:
        parts.append(_tiles(summary_figures(histories[0])))
    parts += [_events(history, several=several) for history in histories]
    parts.append('<div id="charts"><noscript><p>The charts need JavaScript: turn it on.</p></noscript></div>')
    parts.append(_section("Evaluation", _table(evaluation(histories), "<p>No validation has run yet.</p>")))
    if (table := data_read(histories)) is not None:
        parts.append(_section("Data", _table(table)))
    nothing = "<p>events.jsonl records no start.</p>"
    parts.append(_section("Environment", _table(environment(histories), nothing)))
    parts += [_recipe(history, several=several) for history in histories if history.recipe_text]
    parts.append(f"</main><footer>Written by <code>moonlight report</code> on {made}. Times are UTC.</footer>")
    return "\n".join(parts)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _differences(table: TextTable | None, nothing: str) -> str:
    """Return the table of differing settings, collapsed if it is long; `nothing` if no setting differs."""
    title = "Differences between the recipes"
    if table is None or len(table.rows) <= MAX_ROWS:
        return _section(title, _table(table, nothing))
    return f"<details><summary>{title}: {len(table.rows)} settings</summary>{_table(table)}</details>"


def _tiles(figures: Sequence[SummaryFigure]) -> str:
    tiles = "".join(
        f"<div><dt>{escape(figure.label)}</dt><dd>{escape(figure.value)}</dd>"
        f"<dd class=note>{escape(figure.note)}</dd></div>"
        for figure in figures
        if figure.label != "state"
    )
    return f'<section aria-label="summary"><dl class="tiles">{tiles}</dl></section>'


def _summary_table(histories: Sequence[RunHistory]) -> str:
    """Return the summary numbers of several runs, one column per run; notes are below the numbers."""
    columns = [{figure.label: figure for figure in summary_figures(history)} for history in histories]
    labels = dict.fromkeys(label for column in columns for label in column)
    head = "".join(
        f'<th scope="col"><i class="swatch c{index}"></i>{escape(history.name)}</th>'
        for index, history in enumerate(histories)
    )
    rows = []
    for label in labels:
        cells = "".join(
            f"<td>{escape(figure.value)}<small>{escape(figure.note)}</small></td>"
            for column in columns
            for figure in (column.get(label, SummaryFigure(label, "–")),)
        )
        rows.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    return f'<div class="scroll"><table class="summary"><tr><td></td>{head}</tr>{"".join(rows)}</table></div>'


def _table(table: TextTable | None, nothing: str = "") -> str:
    if table is None:
        return nothing
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in table.rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'


def _events(history: RunHistory, *, several: bool) -> str:
    lines = event_lines(history)
    name = f": {escape(history.name)}" if several else ""
    if not lines:
        return "" if several else _section("Events", "<p>events.jsonl is missing or empty.</p>")
    content = _event_list(lines)
    if several:
        return f"<details><summary>Events{name}</summary>{content}</details>"
    if len(lines) > MAX_OPEN + 2:
        earlier, lines = lines[:-MAX_OPEN], lines[-MAX_OPEN:]
        collapsed = f"<details><summary>{len(earlier)} earlier events</summary>{_event_list(earlier)}</details>"
        content = collapsed + _event_list(lines)
    return _section("Events", content)


def _event_list(lines: Sequence[EventLine]) -> str:
    items = "".join(
        f'<li class="{escape(line.kind.replace(" ", "-"))}"><span class="when">{line.when}</span>'
        f'<span class="step">{line.steps}</span><span>{escape(line.text)}</span></li>'
        for line in lines
    )
    return f'<ol class="events">{items}</ol>'


def _recipe(history: RunHistory, *, several: bool) -> str:
    name = f" of {escape(history.name)}" if several else ""
    text = history.recipe_text
    more = "\n…" if len(text) > MAX_RECIPE else ""
    return f"<details><summary>Resolved recipe{name}</summary><pre>{escape(text[:MAX_RECIPE])}{more}</pre></details>"
