"""`moonlight report`: what is read of a run, how it is thinned, what is said of damage."""

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


def lines_of(folder):
    return (folder / "metrics.jsonl").read_text().splitlines(keepends=True)


def write_lines(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def data_in(page):
    """What the page gives to its script."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)["runs"]


def floats(text):
    return np.frombuffer(base64.b64decode(text), "<f4")


def number(value):
    """A finite float, or None: what a figure of metrics.jsonl counts as."""
    try:
        return float(value) if isinstance(value, int | float) and np.isfinite(float(value)) else None
    except OverflowError:
        return None


# ---- Thinning


@settings(deadline=None)
@given(rows=st.dictionaries(st.integers(5, 90), VALUES, min_size=1), most=st.integers(1, 60), pieces=st.integers(1, 4))
def test_buckets_are_those_of_a_slow_twin(rows, most, pieces):
    steps = list(rows)
    grid = StepBuckets.over(min(steps), max(steps), most)
    assert grid.size <= most and grid.first + grid.size * grid.width > max(steps)
    series = Series(grid)
    for part in range(pieces):
        mine = steps[part::pieces]
        series.add(np.array(mine, dtype=np.int64), [rows[step] for step in mine])

    slow = {}
    for step in sorted(rows):
        if (value := number(rows[step])) is not None:
            slow.setdefault((step - min(steps)) // grid.width, []).append(value)
    assert series.filled.tolist() == sorted(slow)
    lowest, mean, highest = series.thinned()
    assert lowest.tolist() == [min(slow[at]) for at in sorted(slow)]
    assert highest.tolist() == [max(slow[at]) for at in sorted(slow)]
    np.testing.assert_allclose(mean, [np.mean(slow[at]) for at in sorted(slow)], rtol=1e-12, atol=1e-9)


CELLS = st.one_of(st.floats(0, 100), st.just(0.0), st.sampled_from([None, float("nan")]))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.dictionaries(
        st.integers(1, 50),
        st.one_of(st.lists(st.lists(CELLS, min_size=3, max_size=3), min_size=2, max_size=2), st.just([[1], [2, 3]])),
        min_size=1,
    ),
    most=st.integers(1, 20),
    largest=st.booleans(),
)
def test_maps_are_those_of_a_slow_twin(rows, most, largest):
    sound = {step: value for step, value in rows.items() if len(value[0]) == 3}
    its = Heatmap(min(rows), max(rows), most, 10**6, largest=largest)
    its.add(np.array(list(rows), dtype=np.int64), list(rows.values()))
    assert its.num_mismatched == len(rows) - len(sound)
    if not sound:
        assert its.for_page() is None
        return
    slow = {}
    for step in sorted(sound):
        for layer in range(2):
            for expert in range(3):
                if (value := number(sound[step][layer][expert])) is not None:
                    at = (step - min(rows)) // its.grid.width
                    slow.setdefault(at, {}).setdefault((layer, expert), []).append(value)
    at, values = its.thinned()
    assert at.tolist() == sorted(slow) and its.grid.size <= most
    for column, bucket in enumerate(at):
        for layer in range(2):
            for expert in range(3):
                found = slow[bucket].get((layer, expert))
                wanted = (max(found) if largest else np.mean(found)) if found else np.nan
                np.testing.assert_allclose(values[column, layer, expert], wanted, rtol=1e-12)


def test_codes_of_loads_are_near_the_loads():
    load_ = np.array([0.0, np.nan, 1e-9, 0.125, 0.5, 1.0, 1.3, 7.9, 8.0, 500.0])
    codes = load_codes(load_)
    assert codes[0] == DEAD and codes[1] == MISSING
    back = 2.0 ** ((codes[2:].astype(float) - 2) / 253 * 6 - 3)
    np.testing.assert_allclose(back, np.clip(load_[2:], 0.125, 8), rtol=0.0083)


def test_points_stay_whole_while_they_are_few():
    points = SparseSeries(StepBuckets.over(1, 100_000, 600))
    points.add(np.array([700, 300]), [2.0, 3.0])
    assert points.for_page()["points"] == [300, 700] and points.last == (700, 2.0)
    steps = np.arange(1000, 2000)
    points.add(steps, steps.tolist())
    assert "points" not in points.for_page() and points.last == (1999, 1999.0)


def test_a_map_of_many_experts_has_fewer_columns():
    its = Heatmap(1, 100_000, 300, MAX_CELLS, largest=False)
    its.add(np.array([10]), [np.ones((58, 256)).tolist()])
    assert 58 * 256 * its.grid.size <= MAX_CELLS


# ---- Reading


@settings(deadline=None, max_examples=80)
@given(
    lines=st.lists(
        st.one_of(
            st.tuples(st.integers(1, 9), st.floats(0, 9)).map(lambda it: f'{{"step": {it[0]}, "loss/train": {it[1]}}}'),
            st.tuples(st.integers(1, 9), st.floats(0, 9)).map(lambda it: f'{{"loss/train": {it[1]},"step":{it[0]}}}'),
            st.sampled_from(
                ['{"step": 3, "loss/tr', "[]", "", "3", '{"step": "4"}', '{"step": -1}', "\x00", "[" * 9000]
            ),
        ),
        max_size=30,
    ),
    whole=st.booleans(),
)
def test_the_last_sound_line_of_a_step_counts(lines, whole, tmp_path_factory):
    path = write_lines(tmp_path_factory.mktemp("lines"), ["\n".join(lines), "\n" if whole else ""]) / "metrics.jsonl"
    slow = {}
    for line in lines if whole else lines[:-1]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and type(entry["step"]) is int and entry["step"] > 0:
            slow[entry["step"]] = entry["loss/train"]
    metrics = load_run_metrics(path, 1)
    if not slow:
        assert metrics is None
        return
    assert metrics.num_steps == len(slow)
    assert (metrics.series["loss/train"].filled + metrics.grid.first).tolist() == sorted(slow)
    assert metrics.series["loss/train"].thinned()[1].tolist() == [slow[step] for step in sorted(slow)]


def test_restart_damage_and_a_cut_line_are_said(tmp_path, capsys):
    folder = write_history(tmp_path / "run", Shape(steps=60))
    lines = lines_of(folder)
    again = [line.replace('"loss/train": ', '"loss/train": 1') for line in lines[40:50]]
    damaged = ['{"step": 12, "loss/tra{"step": 13}\n']
    write_lines(folder, [*lines[:11], *damaged, *lines[12:50], *again, *lines[50:59], lines[59][:200]])
    report([folder], None)
    said = capsys.readouterr().err
    assert said.count("\n") == 3
    for words in ("corrupt line 12", "10 lines are of steps repeated later", "last line is incomplete", "step 59"):
        assert words in said and words in (folder / "report.html").read_text()
    (run,) = data_in((folder / "report.html").read_text())
    loss = floats(run["series"]["loss/train"]["mean"])
    assert run["last"] == 59 and len(loss) == 58 and (loss[39:49] > 10).all() and (loss[49:] < 10).all()


def test_what_is_not_finite_is_missing_and_marked(tmp_path):
    entries = [{"step": step, "loss/train": 2.0, "optim/grad_norm": 1.0, "unknown": {"a": []}} for step in range(1, 41)]
    entries[4]["loss/train"] = None
    entries[9]["loss/train"] = float("nan")
    entries[19]["optim/grad_norm"] = float("inf")
    for entry in entries[29:]:
        entry["optim/skipped_steps"] = 1
    entries[28]["optim/skipped_steps"] = 0
    folder = write_lines(tmp_path / "run", [json.dumps(entry) + "\n" for entry in entries])
    (run,) = data_in(build([load_history(folder, 1)]))
    assert run["marks"]["skipped"] == [5, 10, 20, 30]
    assert 4 not in run["series"]["loss/train"]["at"] and 9 not in run["series"]["loss/train"]["at"]
    assert 19 not in run["series"]["optim/grad_norm"]["at"] and "unknown" not in run["series"]


def test_marks_and_layers_are_those_of_the_run(tmp_path):
    folder = write_history(tmp_path / "run", Shape(steps=1200, trouble=True))
    (run,) = data_in(build([load_history(folder, 1)]))
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


def test_thousands_of_events_are_few_lines(tmp_path):
    folder = write_history(tmp_path / "run", Shape(steps=50))
    kinds = ("spike", "spike", "skipped", "saved", "resumed", "warning")
    events = [{"time": 1.79e9 + n, "event": kinds[n % 6], "step": n % 50, "text": "x" * 5000} for n in range(9000)]
    (folder / "events.jsonl").write_text("\n".join(map(json.dumps, [*events, 3, {"event": 4}])) + "\nnot json")
    history = load_history(folder, 1)
    lines = event_lines(history)
    assert len(lines) <= MAX_LINES + 2 and sum(len(line.text) for line in lines) < 30_000
    assert any("1,500 checkpoints" in line.text for line in lines) and "3 of 9003 lines" in history.warnings[0]


def test_a_run_of_an_older_version_is_told_of(tmp_path):
    folder = write_lines(tmp_path / "old", ['{"step": 1, "loss/train": 3}\n', '{"step": 2, "loss/train": 2}\n'])
    (folder / "config.yaml").write_text("train: {train_steps: 4, gone: 3}\nmodel: {first_k_dense_replace: 2}\n")
    history = load_history(folder, 1)
    assert history.total_steps == 4 and history.first_expert_layer == 2 and not history.warnings
    (run,) = data_in(build([history]))
    assert run["tokens"] is None


# ---- The page


def test_nothing_in_a_run_becomes_markup(tmp_path):
    evil = "<script>alert(1)</script>&<!--"
    folder = write_history(tmp_path / "<img src=x onerror=alert(1)>", Shape(steps=30))
    (folder / "config.yaml").write_text(json.dumps({"name": evil, "data": {"sources": {evil: "</pre>"}}}))
    lines = [json.dumps(json.loads(line) | {"stage": evil, f"loss/validation/{evil}": 1}) for line in lines_of(folder)]
    write_lines(folder, [line + "\n" for line in lines])
    event = {"time": 1, "event": evil, "step": 3, "text": evil + "\ud800"}
    start = {"time": 1, "event": "started", "step": 0, "host": evil, "environment": {evil: evil}}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n" + json.dumps(start) + "\n")
    (folder / "evaluation.json").write_text(json.dumps({evil: {"score": evil}}))
    for page in (build([load_history(folder, 1)]), build([load_history(folder, 2), load_history(folder, 2)])):
        assert "alert(1)</script>" not in page and "<img" not in page and "<!--" not in page
        assert page.count("<script") == 2 and page.count("</script>") == 2 and page.count("</pre>") <= 2
        assert data_in(page)[0]["marks"]["stage"][0][1] == evil


def test_it_needs_neither_torch_nor_network(tmp_path):
    code = "import sys, moonlight.report.write; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
    page = build([load_history(write_history(tmp_path / "run", Shape(steps=20)), 1)])
    assert "http:" not in page and "https:" not in page and "default-src 'none'" in page


def test_runs_compared_differ_by_name_and_recipe(tmp_path, capsys):
    folders = [
        write_history(tmp_path / name / "run", Shape(steps=30, lr=lr)) for name, lr in (("a", 1e-3), ("b", 2e-3))
    ]
    (tmp_path / "empty").mkdir()
    shutil.copy(folders[0] / "config.yaml", tmp_path / "empty")
    out = tmp_path / "new" / "page.html"
    assert report([*folders, tmp_path / "empty", folders[0]], out) == out
    page, said = out.read_text(), capsys.readouterr().err
    assert [run["name"] for run in data_in(page)] == [str(folder) for folder in folders]
    assert "schedule.lr" in page and "0.002" in page and "train.seed" not in page.split("Events")[0]
    assert "given twice" in said and "empty: no step finished yet" in said


@pytest.mark.parametrize("num_runs", [1, 8])
def test_pages_of_many_layers_stay_small(num_runs, tmp_path):
    shape = Shape(steps=6000, layers=26, experts=64, trouble=True)
    folder = write_history(tmp_path / "run", shape)
    history = load_history(folder, num_runs)
    assert len(build([history] * num_runs)) < 5e6


# ---- What is refused


def test_refusals(tmp_path, refuses):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text("name: empty\n")
    write_history(tmp_path / "run", Shape(steps=3))
    for number in range(8):
        write_lines(tmp_path / f"run{number}", ['{"step": 1}\n'])
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
def test_a_damaged_recipe_is_a_warning_at_most(text, tmp_path, capsys):
    folder = write_history(tmp_path / "run", Shape(steps=20))
    (folder / "config.yaml").write_text(text)
    report([folder], tmp_path / "page.html")
    said = capsys.readouterr().err
    assert said.count("\n") == ("model" not in text) and ("model" in text or "config.yaml is corrupt" in said)
