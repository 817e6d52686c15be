"""Loss spikes: scores must equal numpy, and each policy must handle data with noise documents."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from checkpoints.reader import open_checkpoint
from moonlight.data.prepare import prepare
from moonlight.dist_checkpoint.state import read_state, resolve_checkpoint
from moonlight.train.events import read_events
from moonlight.train.metrics import read_metrics
from tests.support.bad_input import in_state
from tests.support.comparisons import outcome
from tests.support.layouts import make_run, train_run

WINDOW, THRESHOLD, STEPS = 8, 8.0, 40


@pytest.fixture(scope="module")
def poisoned(tokenizer_folder, tmp_path_factory):
    """Repetitive text that is easy to learn, with three documents of noise at random positions."""
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
    config = make_run(runs, poisoned, tokenizer_folder, layout, **settings)
    config = replace(config, schedule=replace(config.schedule, lr=1e-2, decay="constant"))
    pool.run(config.parallel.num_processes, train_run, config)
    return config, Path(config.runs_folder) / config.name


def numpy_scores(losses, skipped=()):
    """Return the score of each step by its definition; None if the window is not full."""
    scores, accepted = [], []
    for step, loss in enumerate(losses, start=1):
        recent = np.array(accepted[-WINDOW:])
        score = None
        if len(recent) == WINDOW:
            center = np.median(recent)
            score = (loss - center) / (1.4826 * np.median(np.abs(recent - center)) + 0.01)
        scores.append(score)
        if step not in skipped:
            accepted.append(loss)
    return scores


def test_scores_equal_numpy_and_detect_the_noise(pool, poisoned, tokenizer_folder, tmp_path):
    _, folder = train(pool, tmp_path, poisoned, tokenizer_folder)
    entries = read_metrics(folder)
    expected = numpy_scores([entry["loss/train"] for entry in entries])
    assert [entry.get("loss/spike_score") for entry in entries] == [
        s if s is None else pytest.approx(s) for s in expected
    ]
    spikes = [event["step"] for event in read_events(folder) if event["event"] == "spike"]
    assert spikes == [step for step, score in enumerate(expected, start=1) if score is not None and score > THRESHOLD]
    assert spikes
    assert all(entry["optim/skipped_steps"] == 0 for entry in entries)


def test_a_skipped_spike_changes_no_tensor(pool, poisoned, tokenizer_folder, tmp_path):
    """Checkpoints before and after a skipped step may differ only in the training state."""
    settings = {"spike_policy": "skip", "save_every_steps": 1}
    _, folder = train(pool, tmp_path, poisoned, tokenizer_folder, "DP2", **settings)
    entries = read_metrics(folder)
    skipped = [event["step"] for event in read_events(folder) if event["event"] == "skipped"]
    assert skipped and entries[-1]["optim/skipped_steps"] == len(skipped)
    expected = numpy_scores([entry["loss/train"] for entry in entries], skipped)
    assert skipped == [step for step, score in enumerate(expected, start=1) if score is not None and score > THRESHOLD]
    for step in skipped:
        before, after = (open_checkpoint(folder / "checkpoints" / f"step-{s:08d}") for s in (step - 1, step))
        for key in before.stored.shapes:  # router biases are among them
            assert before.read(key).equal(after.read(key)), key
        assert after.state.recent_losses == before.state.recent_losses
        assert not any(key.startswith("optim/update_rms") for key in entries[step - 1])


def test_a_rollback_equals_a_run_that_never_saw_the_data(pool, poisoned, tokenizer_folder, tmp_path):
    """The reference has no policy. It stops at each step of a rollback, and resumes after the skipped data."""
    settings = {"spike_policy": "rollback", "max_rollbacks_in_a_row": 9}
    config, folder = train(pool, tmp_path / "first", poisoned, tokenizer_folder, "DP2", **settings)
    events = read_events(folder)
    skipped_data: list[tuple[int, int]] = []
    for event in events:
        if event["event"] == "rolled back":
            # The newest checkpoint (every fourth step) at least three steps back.
            assert event["step"] == (event["spike"] - 3) // 4 * 4
            skipped_data = [(step, sequences) for step, sequences in skipped_data if step < event["step"]]
            skipped_data.append((event["step"], event["passed_over_sequences"]))
    assert skipped_data and not any(event["event"] == "skipped" for event in events)
    for step, sequences in skipped_data:
        _, reference = train(pool, tmp_path / "reference", poisoned, tokenizer_folder, "DP2", stop_at_step=step)
        in_state(lambda content, n=sequences: content["state"].update(passed_over_sequences=n))(
            resolve_checkpoint(reference)
        )
    reference_config, _ = train(pool, tmp_path / "reference", poisoned, tokenizer_folder, "DP2")
    (_, tensors, metrics), (_, reference_tensors, reference_metrics) = outcome(config), outcome(reference_config)
    assert metrics == reference_metrics and [entry["step"] for entry in metrics] == list(range(1, STEPS + 1))
    assert all(tensor.equal(reference_tensors[key]) for key, tensor in tensors.items())
    state = read_state(resolve_checkpoint(folder))["state"]
    assert state["passed_over_sequences"] == skipped_data[-1][1] and state["skipped_steps"] == 0


def test_too_many_rollbacks_in_a_row_end_the_training(pool, poisoned, tokenizer_folder, tmp_path):
    """With this low threshold every rise of the loss is a spike, so at least one occurs in any six steps."""
    settings = {"spike_threshold": 1e-9, "spike_window": 1, "save_every_steps": 1, "rollback_steps": 6}
    settings |= {"max_rollbacks_in_a_row": 2, "max_skipped_steps_in_a_row": 100, "spike_policy": "rollback"}
    words = r"UserError: .* another loss spike at step \d+ after 2 rollbacks in a row \(train.max_rollbacks_in_a_row\)"
    with pytest.raises(RuntimeError, match=words):
        train(pool, tmp_path, poisoned, tokenizer_folder, **settings)
    assert sum(event["event"] == "rolled back" for event in read_events(tmp_path / "1")) >= 2


def test_a_rollback_needs_checkpoints(refuses, tiny_run):
    words = "train.rollback_steps is 9: with train.keep_checkpoints=2 and train.save_every_steps=2 it must be at most 2"
    refuses(["pretrain", tiny_run.recipe, "train.spike_policy=rollback", "train.rollback_steps=9"], words)
