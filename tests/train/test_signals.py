"""SIGTERM saves and stops, SIGUSR1 saves and continues, a timer saves; resuming must be bit-identical."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from moonlight.config.load import to_yaml
from moonlight.dist_checkpoint.state import latest_checkpoint, resolve_checkpoint
from moonlight.errors import CODE_KILLED, CODE_STOPPED
from moonlight.train.events import read_events
from tests.support.comparisons import outcome
from tests.support.faults import end, reached, start, wait_until, workers
from tests.support.layouts import make_run, train_run

ENDLESS = {"train_steps": 100_000, "save_every_steps": 100_000, "validate_every_steps": 100_000}


def events_of(folder, *names):
    return [event for event in read_events(folder) if event["event"] in names]


def test_a_signal_to_one_process_saves_all_and_resuming_is_bit_identical(pool, data_folder, tokenizer_folder, tmp_path):
    """The second process gets SIGUSR1 and the command SIGTERM; then the same command must resume."""
    configs = {
        name: make_run(tmp_path / name, data_folder, tokenizer_folder, "EP2", threads_per_process=1, **ENDLESS)
        for name in ("uninterrupted", "parts")
    }
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "parts" / "EP2"
    recipe.write_text(to_yaml(configs["parts"]))

    process = start(recipe)
    assert wait_until(reached(folder, 2), process)
    os.kill(workers(process)[1].pid, signal.SIGUSR1)
    assert wait_until(lambda: events_of(folder, "saved"), process)
    process.send_signal(signal.SIGTERM)
    errors = end(process)
    assert process.returncode == CODE_STOPPED, errors
    assert "saved and stopped after step" in errors and "Traceback" not in errors
    events = [(event["event"], event.get("reason") or event.get("signal")) for event in read_events(folder)]
    assert events == [
        ("started", None),
        ("signal", "SIGUSR1"),
        ("saving", "SIGUSR1"),
        ("saved", None),
        ("signal", "SIGTERM"),
        ("saving", "SIGTERM"),
        ("saved", None),
        ("stopped", None),
    ]
    saved = events_of(folder, "saved")[-1]["step"]
    assert latest_checkpoint(folder / "checkpoints").name == f"step-{saved:08d}"

    stop = saved + 5
    for config in configs.values():
        pool.run(2, train_run, replace(config, train=replace(config.train, stop_at_step=stop)))
    (_, tensors, metrics), (_, other_tensors, other_metrics) = (
        outcome(configs["uninterrupted"]),
        outcome(configs["parts"]),
    )
    assert metrics == other_metrics and [entry["step"] for entry in metrics] == list(range(1, stop + 1))
    assert all(tensor.equal(other_tensors[key]) for key, tensor in tensors.items())
    resumed = events_of(folder, "resumed")[0]
    assert resumed["step"] == saved and resumed["world_size"] == 2 and resumed["restart"] == 0


@pytest.mark.slow
def test_torchrun_forwards_signals_to_save_and_stop(data_folder, tokenizer_folder, tmp_path):
    config = make_run(tmp_path, data_folder, tokenizer_folder, "DP2", threads_per_process=1, **ENDLESS)
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "DP2"
    recipe.write_text(to_yaml(config))
    process = start(recipe, torchrun_restarts=3)
    assert wait_until(reached(folder, 2), process)
    process.send_signal(signal.SIGUSR1)
    assert wait_until(lambda: events_of(folder, "saved"), process)
    process.send_signal(signal.SIGTERM)
    errors = end(process)
    assert process.returncode == 1, errors
    events = [event["event"] for event in read_events(folder)]
    assert events == ["started", *["signal", "saving", "saved"] * 2, "stopped"]
    assert resolve_checkpoint(folder).name == f"step-{events_of(folder, 'stopped')[0]['step']:08d}"


def test_the_timer_saves(pool, data_folder, tokenizer_folder, tmp_path):
    config = make_run(tmp_path, data_folder, tokenizer_folder, "DP2", save_every_minutes=1e-6, save_every_steps=8)
    pool.run(2, train_run, config)
    saving, saved = (events_of(tmp_path / "DP2", name) for name in ("saving", "saved"))
    assert [(event["step"], event["reason"]) for event in saving] == [(step, "clock") for step in range(1, 9)]
    assert [event["step"] for event in saved] == list(range(1, 9))
    assert resolve_checkpoint(tmp_path / "DP2").name == "step-00000008"


def test_a_stop_that_takes_too_long_ends_the_process(data_folder, tokenizer_folder, tmp_path):
    """With the other process frozen, no save can complete; the last checkpoint must stay valid."""
    config = make_run(
        tmp_path, data_folder, tokenizer_folder, "EP2", **ENDLESS | {"save_every_steps": 2}, grace_seconds=2.0
    )
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "EP2"
    recipe.write_text(to_yaml(config))
    process = start(recipe)
    assert wait_until(lambda: events_of(folder, "saved"), process)
    os.kill(workers(process)[1].pid, signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    errors = end(process)
    assert process.returncode == CODE_KILLED, errors
    assert "error: rank 0 could not save within train.grace_seconds (2.0) after SIGTERM" in errors
    assert Path(resolve_checkpoint(folder) / "state.json").is_file()
