"""Runs killed with SIGKILL at random moments and restarted must end bit-identical to an uninterrupted run."""

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from moonlight.config.load import to_yaml
from moonlight.dist_checkpoint.state import complete_checkpoints
from moonlight.train.events import read_events
from moonlight.train.metrics import read_metrics
from tests.support.comparisons import check_same
from tests.support.faults import end, start, wait_until, workers
from tests.support.layouts import make_run, train_run
from tests.support.suites import quick

STEPS, MAX_KILLS = 60, 2
KINDS = (0, 1, 2)
"""One of each kind: under our launcher, under torchrun, and with the launcher killed too."""


def make_config(runs, data_folder, tokenizer_folder):
    config = make_run(
        runs,
        data_folder,
        tokenizer_folder,
        "EP2",
        train_steps=STEPS,
        save_every_steps=4,
        validate_every_steps=20,
        threads_per_process=1,
        max_restarts=MAX_KILLS,
    )
    return replace(config, model=replace(config.model, num_hidden_layers=2))


@pytest.fixture(scope="module")
def uninterrupted(pool, data_folder, tokenizer_folder, tmp_path_factory):
    config = make_config(tmp_path_factory.mktemp("uninterrupted"), data_folder, tokenizer_folder)
    pool.run(2, train_run, config)
    return config


def last_step(folder):
    entries = read_metrics(folder)
    return entries[-1]["step"] if entries else 0


def saved_step(folder):
    """Return the step of the newest complete checkpoint."""
    return max((int(path.name.removeprefix("step-")) for path in complete_checkpoints(folder)), default=0)


def is_saving(folder):
    return any((folder / "checkpoints").glob(".step-*.part"))


def kill_at_random(process, folder, rng, during_save):
    """Kill one process, or both, at a random later moment.

    Return the step of the newest checkpoint just before the kill; None if the run ended first.
    """
    target = last_step(folder) + rng.randint(1, STEPS // 4)
    if not wait_until(lambda: last_step(folder) >= target, process):
        return None
    if during_save:
        if not wait_until(lambda: is_saving(folder), process):
            return None
        time.sleep(rng.random() / 50)
    else:
        time.sleep(rng.random() / 5)
    victims = workers(process)
    ranks = rng.choice([[0], [1], [0, 1]])
    saved = saved_step(folder)
    for rank in ranks:
        if rank in victims:
            os.kill(victims[rank].pid, signal.SIGKILL)
    return saved


def all_ended(process_list):
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in process_list)


def run_until_finished(case, runs, data_folder, tokenizer_folder):
    """Run one case, killed once or twice and restarted; return its config and the number of kills."""
    rng = random.Random(case)
    config = make_config(runs, data_folder, tokenizer_folder)
    recipe, folder = runs / "recipe.yaml", runs / config.name
    runs.mkdir(exist_ok=True)
    recipe.write_text(to_yaml(config))
    torchrun_restarts = MAX_KILLS if case % 3 == 1 else None
    process = start(recipe, torchrun_restarts=torchrun_restarts)
    kills = 0
    try:
        for _ in range(rng.choice([1, 1, MAX_KILLS])):
            saved = kill_at_random(process, folder, rng, during_save=rng.random() < 0.5)
            if saved is None:
                break
            kills += 1
            starts = kills  # one start precedes each kill
            if case % 3 == 2:  # the launcher too, so that the command must be rerun
                before = list(workers(process).values())
                os.kill(process.pid, signal.SIGKILL)
                process.communicate()
                assert wait_until_ended(before)
                process = start(recipe)
            restarted = wait_until(lambda count=starts: len(start_events(folder)) > count, process)
            assert restarted or process.returncode == 0, end(process)
            if restarted:  # no progress was lost beyond the last save
                assert start_events(folder)[starts]["step"] >= saved
        errors = end(process)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return config, kills


def start_events(folder):
    return [event for event in read_events(folder) if event["event"] in ("started", "resumed")]


def wait_until_ended(process_list):
    deadline = time.monotonic() + 60
    while not all_ended(process_list) and time.monotonic() < deadline:
        time.sleep(0.05)
    return all_ended(process_list)


def check_run(case, uninterrupted, data_folder, tokenizer_folder, runs_folder: Path):
    config, kills = run_until_finished(case, runs_folder, data_folder, tokenizer_folder)
    check_same(uninterrupted, config)
    assert read_events(runs_folder / config.name)[-1]["event"] == "finished"
    return kills


@pytest.mark.parametrize("case", quick(KINDS, 0))
def test_killed_and_restarted(uninterrupted, data_folder, tokenizer_folder, tmp_path, case):
    assert check_run(case, uninterrupted, data_folder, tokenizer_folder, tmp_path / str(case)) > 0


@pytest.mark.faults
def test_fifty_killed_and_restarted(uninterrupted, data_folder, tokenizer_folder, tmp_path):
    kills = [check_run(case, uninterrupted, data_folder, tokenizer_folder, tmp_path / str(case)) for case in range(50)]
    print(f"{sum(kills)} kills of {len(kills)} runs")
    assert sum(kills) >= len(kills)
