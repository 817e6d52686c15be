"""Loss spikes: their score against numpy, and what each policy does with data that has a poisoned stretch."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bad_input import NEWEST, check_line, in_state
from layouts import make_run, train_run
from test_resume import outcome

from moonlight.data.prepare import prepare
from moonlight.train.checkpoint_files import find, read_state
from moonlight.train.events import read_events
from moonlight.train.metrics import read_metrics

WINDOW, THRESHOLD, STEPS = 8, 8.0, 40


@pytest.fixture(scope="module")
def poisoned(tokenizer_folder, tmp_path_factory):
    """Monotonous text, easy to learn, with three documents of noise somewhere in it."""
    folder = tmp_path_factory.mktemp("poisoned")
    generator = np.random.default_rng(3)
    noise = ["".join(map(chr, generator.integers(33, 0x2000, 60))) for _ in range(3)]
    line = "The moon shines on the river, and the river carries the moonlight to the sea. "
    texts = [f"Night {number}. {line * 8}" for number in range(120)] + noise
    generator.shuffle(texts)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([folder / "texts.jsonl"], tokenizer_folder, folder / "data", validation_share=0.05)
    return folder / "data"


def train(pool, runs, poisoned, tokenizer_folder, layout="1", **settings):
    settings = {"spike_window": WINDOW, "spike_threshold": THRESHOLD, "validate_every_steps": 1000} | settings
    settings = {"train_steps": STEPS, "save_every_steps": 4, "keep_checkpoints": 0, "rollback_steps": 3} | settings
    run = make_run(runs, poisoned, tokenizer_folder, layout, **settings)
    run = replace(run, schedule=replace(run.schedule, lr=1e-2, decay="constant"))
    pool.run(run.parallel.num_processes, train_run, run)
    return run, Path(run.runs_folder) / run.name


def numpy_scores(losses, skipped=()):
    """The score of each step by its definition; None where the window is not full."""
    scores, kept = [], []
    for step, loss in enumerate(losses, start=1):
        recent = np.array(kept[-WINDOW:])
        score = None
        if len(recent) == WINDOW:
            center = np.median(recent)
            score = (loss - center) / (1.4826 * np.median(np.abs(recent - center)) + 0.01)
        scores.append(score)
        if step not in skipped:
            kept.append(loss)
    return scores


def test_scores_equal_numpy_and_find_the_poison(pool, poisoned, tokenizer_folder, tmp_path):
    run, folder = train(pool, tmp_path, poisoned, tokenizer_folder)
    entries = read_metrics(folder)
    expected = numpy_scores([entry["loss/train"] for entry in entries])
    assert [entry.get("loss/spike_score") for entry in entries] == [s if s is None else pytest.approx(s) for s in expected]
    spikes = [event["step"] for event in read_events(folder) if event["event"] == "spike"]
    assert spikes == [step for step, score in enumerate(expected, start=1) if score is not None and score > THRESHOLD]
    assert spikes
    assert all(entry["optim/skipped_steps"] == 0 for entry in entries)
    print("spikes", spikes, [round(e["loss/train"], 2) for e in entries])
