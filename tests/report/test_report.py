"""`moonlight report`: reading a run, downsampling it, and warnings about corrupt files."""

import base64
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moonlight.report.facts import state, summary_figures
from moonlight.report.happened import MAX_LINES, event_lines
from moonlight.report.history import load_history
from moonlight.report.metrics import MAX_CELLS, load_run_metrics
from moonlight.report.page import build
from moonlight.report.thin import DEAD, MISSING, Heatmap, Series, SparseSeries, StepBuckets, load_codes
from moonlight.report.write import report
from tests.support.bad_input import ROOT
from tests.support.histories import Shape, write_history

VALUES = st.one_of(
    st.floats(-1e6, 1e6),
    st.integers(-1000, 1000),
    st.sampled_from([None, float("nan"), float("inf"), 10**400, "x", []]),
)


def read_lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines(keepends=True)


def write_lines(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def page_data(page):
    """Return the data that the page holds for its script."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)["runs"]


def floats(text):
    return np.frombuffer(base64.b64decode(text), "<f4")


def number(value):
    """Return a value of metrics.jsonl as a finite float, or None."""
    try:
        return float(value) if isinstance(value, int | float) and np.isfinite(float(value)) else None
    except OverflowError:
        return None


# ---- Downsampling


@settings(deadline=None)
@given(
    rows=st.dictionaries(st.integers(5, 90), VALUES, min_size=1),
    max_buckets=st.integers(1, 60),
    num_parts=st.integers(1, 4),
)
def test_buckets_equal_a_slow_reference(rows, max_buckets, num_parts):
    steps = list(rows)
    grid = StepBuckets.over(min(steps), max(steps), max_buckets)
    assert grid.size <= max_buckets and grid.first + grid.size * grid.width > max(steps)
    series = Series(grid)
    for part in range(num_parts):
        part_steps = steps[part::num_parts]
        series.add(np.array(part_steps, dtype=np.int64), [rows[step] for step in part_steps])

    expected = {}
    for step in sorted(rows):
        if (value := number(rows[step])) is not None:
            expected.setdefault((step - min(steps)) // grid.width, []).append(value)
    assert series.filled.tolist() == sorted(expected)
    lowest, mean, highest = series.thinned()
    assert lowest.tolist() == [min(expected[bucket]) for bucket in sorted(expected)]
    assert highest.tolist() == [max(expected[bucket]) for bucket in sorted(expected)]
    np.testing.assert_allclose(mean, [np.mean(expected[bucket]) for bucket in sorted(expected)], rtol=1e-12, atol=1e-9)


CELLS = st.one_of(st.floats(0, 100), st.just(0.0), st.sampled_from([None, float("nan")]))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.dictionaries(
        st.integers(1, 50),
        st.one_of(st.lists(st.lists(CELLS, min_size=3, max_size=3), min_size=2, max_size=2), st.just([[1], [2, 3]])),
        min_size=1,
    ),
    max_columns=st.integers(1, 20),
    largest=st.booleans(),
)
def test_heatmaps_equal_a_slow_reference(rows, max_columns, largest):
    valid = {step: value for step, value in rows.items() if len(value[0]) == 3}
    heatmap = Heatmap(min(rows), max(rows), max_columns, 10**6, largest=largest)
    heatmap.add(np.array(list(rows), dtype=np.int64), list(rows.values()))
    assert heatmap.num_mismatched == len(rows) - len(valid)
    if not valid:
        assert heatmap.for_page() is None
        return
    expected = {}
    for step in sorted(valid):
        for layer in range(2):
            for expert in range(3):
                if (value := number(valid[step][layer][expert])) is not None:
                    buckets = (step - min(rows)) // heatmap.grid.width
                    expected.setdefault(buckets, {}).setdefault((layer, expert), []).append(value)
    buckets, values = heatmap.thinned()
    assert buckets.tolist() == sorted(expected) and heatmap.grid.size <= max_columns
    for column, bucket in enumerate(buckets):
        for layer in range(2):
            for expert in range(3):
                cell_values = expected[bucket].get((layer, expert))
                expected_value = (max(cell_values) if largest else np.mean(cell_values)) if cell_values else np.nan
                np.testing.assert_allclose(values[column, layer, expert], expected_value, rtol=1e-12)


def test_load_codes_are_near_the_loads():
    loads = np.array([0.0, np.nan, 1e-9, 0.125, 0.5, 1.0, 1.3, 7.9, 8.0, 500.0])
    codes = load_codes(loads)
    assert codes[0] == DEAD and codes[1] == MISSING
    decoded = 2.0 ** ((codes[2:].astype(float) - 2) / 253 * 6 - 3)
    np.testing.assert_allclose(decoded, np.clip(loads[2:], 0.125, 8), rtol=0.0083)


def test_few_points_are_not_downsampled():
    points = SparseSeries(StepBuckets.over(1, 100_000, 600))
    points.add(np.array([700, 300]), [2.0, 3.0])
    assert points.for_page()["points"] == [300, 700] and points.last == (700, 2.0)
    steps = np.arange(1000, 2000)
    points.add(steps, steps.tolist())
    assert "points" not in points.for_page() and points.last == (1999, 1999.0)


def test_a_heatmap_of_many_experts_has_fewer_columns():
    heatmap = Heatmap(1, 100_000, 300, MAX_CELLS, largest=False)
    heatmap.add(np.array([10]), [np.ones((58, 256)).tolist()])
    assert 58 * 256 * heatmap.grid.size <= MAX_CELLS


# ---- Reading


@settings(deadline=None, max_examples=80)
@given(
    lines=st.lists(
        st.one_of(
            st.tuples(st.integers(1, 9), st.floats(0, 9)).map(
                lambda pair: f'{{"step": {pair[0]}, "loss/train": {pair[1]}}}'
            ),
            st.tuples(st.integers(1, 9), st.floats(0, 9)).map(
                lambda pair: f'{{"loss/train": {pair[1]},"step":{pair[0]}}}'
            ),
            st.sampled_from(
                ['{"step": 3, "loss/tr', "[]", "", "3", '{"step": "4"}', '{"step": -1}', "\x00", "[" * 9000]
            ),
        ),
        max_size=30,
    ),
    has_newline=st.booleans(),
)
def test_the_last_valid_line_of_a_step_counts(lines, has_newline, tmp_path_factory):
    folder = write_lines(tmp_path_factory.mktemp("lines"), ["\n".join(lines), "\n" if has_newline else ""])
    expected = {}
    for line in lines if has_newline else lines[:-1]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and type(entry["step"]) is int and entry["step"] > 0:
            expected[entry["step"]] = entry["loss/train"]
    metrics = load_run_metrics(folder / "metrics.jsonl", 1)
    if not expected:
        assert metrics is None
        return
    assert metrics.num_steps == len(expected)
    assert (metrics.series["loss/train"].filled + metrics.grid.first).tolist() == sorted(expected)
    assert metrics.series["loss/train"].thinned()[1].tolist() == [expected[step] for step in sorted(expected)]


def test_warnings_name_repeated_corrupt_and_incomplete_lines(tmp_path, capsys):
    folder = write_history(tmp_path / "run", Shape(steps=60))
    lines = read_lines(folder)
    repeated = [line.replace('"loss/train": ', '"loss/train": 1') for line in lines[40:50]]
    corrupt = ['{"step": 12, "loss/tra{"step": 13}\n']
    write_lines(folder, [*lines[:11], *corrupt, *lines[12:50], *repeated, *lines[50:59], lines[59][:200]])
    report([folder], None)
    warnings = capsys.readouterr().err
    assert warnings.count("\n") == 3
    for words in ("corrupt line 12", "10 lines are of steps repeated later", "last line is incomplete", "step 59"):
        assert words in warnings and words in (folder / "report.html").read_text()
    (run,) = page_data((folder / "report.html").read_text())
    loss = floats(run["series"]["loss/train"]["mean"])
    assert run["last"] == 59 and len(loss) == 58 and (loss[39:49] > 10).all() and (loss[49:] < 10).all()


def test_values_that_are_not_finite_are_missing_and_marked(tmp_path):
    entries = [{"step": step, "loss/train": 2.0, "optim/grad_norm": 1.0, "unknown": {"a": []}} for step in range(1, 41)]
    entries[4]["loss/train"] = None
    entries[9]["loss/train"] = float("nan")
    entries[19]["optim/grad_norm"] = float("inf")
    for entry in entries[29:]:
        entry["optim/skipped_steps"] = 1
    entries[28]["optim/skipped_steps"] = 0
    folder = write_lines(tmp_path / "run", [json.dumps(entry) + "\n" for entry in entries])
    (run,) = page_data(build([load_history(folder, 1)]))
    assert run["marks"]["skipped"] == [5, 10, 20, 30]
    assert 4 not in run["series"]["loss/train"]["at"] and 9 not in run["series"]["loss/train"]["at"]
    assert 19 not in run["series"]["optim/grad_norm"]["at"] and "unknown" not in run["series"]


def test_marks_and_layers_equal_the_runs(tmp_path):
    folder = write_history(tmp_path / "run", Shape(steps=1200, trouble=True))
    (run,) = page_data(build([load_history(folder, 1)]))
    assert run["firstExpertLayer"] == 1
    assert run["marks"]["restart"] == [252, 564, 570, 996] and run["marks"]["spike"] == [372, 624, 792]
    assert run["marks"]["rollback"] == [692] and run["marks"]["skipped"] == [372, 624, 840]
    assert [name for _, name in run["marks"]["stage"]] == ["warmup", "cosine", "cooldown"]


@pytest.mark.parametrize(
    ("events", "total", "word"),
    [
        (["started", "finished"], 50, "finished"),
        (["started", "stopped"], 90, "stopped"),
        (["started", "stopped", "resumed"], 90, "in progress or interrupted"),
        ([], 90, "in progress or interrupted"),
        ([], 50, "finished"),
    ],
)
def test_the_state_of_a_run(events, total, word, tmp_path):
    folder = write_history(tmp_path / "run", Shape(steps=50, total_steps=total))
    text = [json.dumps({"time": 1.79e9, "event": event, "step": 50}) + "\n" for event in events]
    (folder / "events.jsonl").write_text("".join(text))
    history = load_history(folder, 1)
    assert state(history)[0] == word and f"{50 / total:.0%} of {total}" in [
        fact.note for fact in summary_figures(history)
    ]


def test_thousands_of_events_become_few_lines(tmp_path):
    folder = write_history(tmp_path / "run", Shape(steps=50))
    kinds = ("spike", "spike", "skipped", "saved", "resumed", "warning")
    events = [{"time": 1.79e9 + n, "event": kinds[n % 6], "step": n % 50, "text": "x" * 5000} for n in range(9000)]
    (folder / "events.jsonl").write_text("\n".join(map(json.dumps, [*events, 3, {"event": 4}])) + "\nnot json")
    history = load_history(folder, 1)
    lines = event_lines(history)
    assert len(lines) <= MAX_LINES + 2 and sum(len(line.text) for line in lines) < 30_000
    assert any("1,500 checkpoints" in line.text for line in lines) and "3 of 9003 lines" in history.warnings[0]


def test_a_run_of_an_older_version_is_read(tmp_path):
    folder = write_lines(tmp_path / "old", ['{"step": 1, "loss/train": 3}\n', '{"step": 2, "loss/train": 2}\n'])
    (folder / "config.yaml").write_text("train: {train_steps: 4, gone: 3}\nmodel: {first_k_dense_replace: 2}\n")
    history = load_history(folder, 1)
    assert history.total_steps == 4 and history.first_expert_layer == 2 and not history.warnings
    (run,) = page_data(build([history]))
    assert run["tokens"] is None


# ---- The page


def test_nothing_in_a_run_becomes_markup(tmp_path):
    evil = "<script>alert(1)</script>&<!--"
    folder = write_history(tmp_path / "<img src=x onerror=alert(1)>", Shape(steps=30))
    (folder / "config.yaml").write_text(json.dumps({"name": evil, "data": {"sources": {evil: "</pre>"}}}))
    lines = [
        json.dumps(json.loads(line) | {"stage": evil, f"loss/validation/{evil}": 1}) for line in read_lines(folder)
    ]
    write_lines(folder, [line + "\n" for line in lines])
    event = {"time": 1, "event": evil, "step": 3, "text": evil + "\ud800"}
    start = {"time": 1, "event": "started", "step": 0, "host": evil, "environment": {evil: evil}}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n" + json.dumps(start) + "\n")
    (folder / "evaluation.json").write_text(json.dumps({evil: {"score": evil}}))
    for page in (build([load_history(folder, 1)]), build([load_history(folder, 2), load_history(folder, 2)])):
        assert "alert(1)</script>" not in page and "<img" not in page and "<!--" not in page
        assert page.count("<script") == 2 and page.count("</script>") == 2 and page.count("</pre>") <= 2
        assert page_data(page)[0]["marks"]["stage"][0][1] == evil


def test_report_needs_neither_torch_nor_network(tmp_path):
    code = "import sys, moonlight.report.write; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
    page = build([load_history(write_history(tmp_path / "run", Shape(steps=20)), 1)])
    assert "http:" not in page and "https:" not in page and "default-src 'none'" in page


def test_a_comparison_shows_names_and_recipe_differences(tmp_path, capsys):
    folders = [
        write_history(tmp_path / name / "run", Shape(steps=30, lr=lr)) for name, lr in (("a", 1e-3), ("b", 2e-3))
    ]
    (tmp_path / "empty").mkdir()
    shutil.copy(folders[0] / "config.yaml", tmp_path / "empty")
    out = tmp_path / "new" / "page.html"
    assert report([*folders, tmp_path / "empty", folders[0]], out) == out
    page, warnings = out.read_text(), capsys.readouterr().err
    assert [run["name"] for run in page_data(page)] == [str(folder) for folder in folders]
    assert "schedule.lr" in page and "0.002" in page and "train.seed" not in page.split("Events")[0]
    assert "given twice" in warnings and "empty: no step finished yet" in warnings


@pytest.mark.parametrize("num_runs", [1, 8])
def test_pages_of_many_layers_stay_small(num_runs, tmp_path):
    shape = Shape(steps=6000, layers=26, experts=64, trouble=True)
    folder = write_history(tmp_path / "run", shape)
    history = load_history(folder, num_runs)
    assert len(build([history] * num_runs)) < 5e6


# ---- Errors


def test_invalid_arguments_are_refused(tmp_path, refuses):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text("name: empty\n")
    write_history(tmp_path / "run", Shape(steps=3))
    for index in range(8):
        write_lines(tmp_path / f"run{index}", ['{"step": 1}\n'])
    refuses(["report", tmp_path / "none"], f"{tmp_path}/none", "does not exist", "runs/")
    refuses(["report", tmp_path / "file"], "is a file", "runs/")
    refuses(["report", tmp_path / "folder"], "not a run", "config.yaml", "metrics.jsonl", "runs/")
    refuses(["report", tmp_path / "empty"], f"{tmp_path}/empty", "no step finished yet")
    refuses(["report", tmp_path / "run", "--out", tmp_path / "folder"], "a folder", "report.html")
    refuses(["report", tmp_path / "run", "--out", tmp_path / "file" / "page.html"], f"{tmp_path}/file is a file")
    refuses(["report", tmp_path / "run", *(tmp_path / f"run{n}" for n in range(8))], "9 folders", "at most 8")
    refuses(["report"], "'runs'", "--help")
    write_lines(tmp_path / "empty", ['{"step": 1'])
    refuses(["report", tmp_path / "empty"], "no step finished yet")


@pytest.mark.parametrize(
    "text", ["a: [", "- 1\n", "\x00", "model: 3\ntrain: 4\n", "name: !!python/object:os.system {}"]
)
def test_a_corrupt_recipe_gives_at_most_a_warning(text, tmp_path, capsys):
    folder = write_history(tmp_path / "run", Shape(steps=20))
    (folder / "config.yaml").write_text(text)
    report([folder], tmp_path / "page.html")
    warnings = capsys.readouterr().err
    assert warnings.count("\n") == ("model" not in text) and ("model" in text or "config.yaml is corrupt" in warnings)
