"""Runs killed with SIGKILL at random moments, restarted until they end: the same bits as one never killed."""

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
FIRST = (0, 1, 2)
"""Under our launcher, under torchrun, and with the launcher killed too."""


def make(runs, data_folder, tokenizer_folder):
    run = make_run(
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
    return replace(run, model=replace(run.model, num_hidden_layers=2))


@pytest.fixture(scope="module")
def uninterrupted(pool, data_folder, tokenizer_folder, tmp_path_factory):
    run = make(tmp_path_factory.mktemp("whole"), data_folder, tokenizer_folder)
    pool.run(2, train_run, run)
    return run


def last_step(folder):
    entries = read_metrics(folder)
    return entries[-1]["step"] if entries else 0


def saved_step(folder):
    """Of the newest complete checkpoint."""
    return max((int(there.name.removeprefix("step-")) for there in complete_checkpoints(folder)), default=0)


def is_saving(folder):
    return any((folder / "checkpoints").glob(".step-*.part"))


def kill_somewhere(process, folder, choice, during_save):
    """Kill one process, or both, at a random moment later on; None if the run ended before.

    Returns the step of the newest checkpoint there was just before.
    """
    target = last_step(folder) + choice.randint(1, STEPS // 4)
    if not wait_until(lambda: last_step(folder) >= target, process):
        return None
    if during_save:
        if not wait_until(lambda: is_saving(folder), process):
            return None
        time.sleep(choice.random() / 50)
    else:
        time.sleep(choice.random() / 5)
    victims = workers(process)
    whom = choice.choice([[0], [1], [0, 1]])
    saved = saved_step(folder)
    for rank in whom:
        if rank in victims:
            os.kill(victims[rank].pid, signal.SIGKILL)
    return saved


def has_gone(process_list):
    return not any(there.is_running() and there.status() != psutil.STATUS_ZOMBIE for there in process_list)


def run_until_finished(number, runs, data_folder, tokenizer_folder):
    """Run number `number`, killed once or twice and restarted; returns its recipe and how often it was killed."""
    choice = random.Random(number)
    run = make(runs, data_folder, tokenizer_folder)
    recipe, folder = runs / "recipe.yaml", runs / run.name
    runs.mkdir(exist_ok=True)
    recipe.write_text(to_yaml(run))
    torchrun_restarts = MAX_KILLS if number % 3 == 1 else None
    process = start(recipe, torchrun_restarts=torchrun_restarts)
    kills = 0
    try:
        for _ in range(choice.choice([1, 1, MAX_KILLS])):
            saved = kill_somewhere(process, folder, choice, during_save=choice.random() < 0.5)
            if saved is None:
                break
            kills += 1
            starts = kills  # one before each kill
            if number % 3 == 2:  # the launcher too, so that its command must be given again
                before = list(workers(process).values())
                os.kill(process.pid, signal.SIGKILL)
                process.communicate()
                assert wait_until_gone(before)
                process = start(recipe)
            again = wait_until(lambda known=starts: len(starts_of(folder)) > known, process)
            assert again or process.returncode == 0, end(process)
            if again:  # no progress lost beyond the last save
                assert starts_of(folder)[starts]["step"] >= saved
        errors = end(process)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return run, kills


def starts_of(folder):
    return [event for event in read_events(folder) if event["event"] in ("started", "resumed")]


def wait_until_gone(process_list):
    deadline = time.monotonic() + 60
    while not has_gone(process_list) and time.monotonic() < deadline:
        time.sleep(0.05)
    return has_gone(process_list)


def check_run(number, uninterrupted, data_folder, tokenizer_folder, place: Path):
    run, kills = run_until_finished(number, place, data_folder, tokenizer_folder)
    check_same(uninterrupted, run)
    assert read_events(place / run.name)[-1]["event"] == "finished"
    return kills


@pytest.mark.parametrize("number", quick(FIRST, 0))
def test_killed_and_restarted(uninterrupted, data_folder, tokenizer_folder, tmp_path, number):
    assert check_run(number, uninterrupted, data_folder, tokenizer_folder, tmp_path / str(number)) > 0


@pytest.mark.faults
def test_fifty_killed_and_restarted(uninterrupted, data_folder, tokenizer_folder, tmp_path):
    kills = [
        check_run(number, uninterrupted, data_folder, tokenizer_folder, tmp_path / str(number)) for number in range(50)
    ]
    print(f"{sum(kills)} kills of {len(kills)} runs")
    assert sum(kills) >= len(kills)
