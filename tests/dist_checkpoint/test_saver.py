"""Saves that go wrong while training goes on: a full disk, a killed process, a rank that cannot write."""

import os
import resource
import shutil
import signal
import time
from dataclasses import replace
from unittest import mock

import psutil
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from checkpoints.reader import open_checkpoint
from moonlight.dist_checkpoint.async_save import AsyncCheckpointer
from moonlight.dist_checkpoint.index import StoredTensors
from moonlight.dist_checkpoint.lifecycle import apply_retention, commit_checkpoint
from moonlight.dist_checkpoint.recovery import verify_checkpoint
from moonlight.dist_checkpoint.state import TrainState, checkpoint_step, complete_checkpoints, latest_checkpoint
from moonlight.errors import UserError
from moonlight.optim import master_weights as master
from moonlight.train.metrics import read_metrics
from tests.support.bad_input import check_line, command, run_command
from tests.support.layouts import LAYOUTS, build, recipe

SMALL_BYTES = 60_000
"""More than metrics and logs take, and less than a checkpoint's file."""


def largest_file(nbytes, pid=0):
    """Let a process write no file beyond `nbytes`, as a full disk would; what is there stays."""
    _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (most if nbytes is None else nbytes, most))


def saver_of(run, folder):
    _, optimizer = build(run)
    return AsyncCheckpointer(folder, run, optimizer, tokenizer_sha256="abc"), optimizer


def split_masters_at_once(run, folder):
    """The most float32 copies of split masters that are there at any time of a save, and how many there are in all."""
    _, optimizer = build(run)
    made, most = [], 0
    original = master.join_halves

    def join(*halves):
        nonlocal most
        whole = original(*halves)
        made.append(StorageWeakRef(whole.untyped_storage()))
        most = max(most, sum(not one.expired() for one in made))
        return whole

    with mock.patch.object(master, "join_halves", join):
        saver = AsyncCheckpointer(folder, run, optimizer, tokenizer_sha256="abc")
        saver.save(TrainState(step=1))
        saver.finalize()
    return most, len(made)


@pytest.mark.parametrize("async_save", (True, False))
def test_a_save_makes_split_masters_one_after_the_other(pool, tmp_path, async_save):
    run = recipe(dtype="bfloat16", async_save=async_save)
    run = replace(run, optimizer=replace(run.optimizer, master_weights="split"))
    ((most, made),) = pool.run(1, split_masters_at_once, run, tmp_path)
    assert most <= 2 and made > 10


def one_rank_cannot_write(run, folder, failing):
    """What this rank says of three saves of which it or another cannot write the second and the third."""
    saver, _ = saver_of(run, folder)
    said = []
    for step in (1, 2):
        if step == 2 and torch.distributed.get_rank() == failing:
            largest_file(SMALL_BYTES)
        saver.save(TrainState(step=step))
        if step == 1:
            saver.finalize()
    assert saver.save(TrainState(step=3)) > 0
    try:
        saver.finalize()
    except UserError as error:
        said.append(str(error))
    finally:
        largest_file(None)
    said += [message.text for message in saver.pop_events()]
    there = sorted(path.name for path in folder.iterdir())
    torch.distributed.barrier()
    saver.save(TrainState(step=4))
    saver.finalize()
    assert {"time/save_pause_seconds"} <= saver.pop_metrics().keys()
    return said, there


@pytest.mark.parametrize(("failing", "async_save"), [(0, True), (1, True), (1, False)])
def test_a_rank_that_cannot_write(pool, tmp_path, failing, async_save):
    run = recipe(LAYOUTS["DP2"][1], async_save=async_save)
    (first, there), (second, _) = pool.run(2, one_rank_cannot_write, run, tmp_path, failing)
    error, *messages = first
    assert second == [error]
    assert f"checkpoint {tmp_path / 'step-00000003'} could not be written" in error
    assert f"process {failing}: File too large; the disk, or the limit that `ulimit -f` shows" in error
    assert there == ["latest", "step-00000001"]
    (warning,) = [text for text in messages if text.startswith(f"warning: checkpoint {tmp_path / 'step-00000002'}")]
    assert "training continues, and the next save runs on schedule" in warning and f"process {failing}:" in warning
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000004"
    assert not list(tmp_path.glob(".step-*"))


def save_then_change(run, folder):
    """Whether the last checkpoint holds the weights as they were when saving began; they change as soon as they may."""
    saver, optimizer = saver_of(run, folder)
    values = [owned.master_weight.to_float32() for owned in optimizer.owned]
    before = [value.clone() for value in values]
    for step in range(1, 7):
        saver.save(TrainState(step=step))
        saver.wait_until_staged()
        for value, kept in zip(values, before, strict=True):
            value.add_(1)
            kept.add_(step < 6)
    saver.finalize()
    verify_checkpoint(latest_checkpoint(folder))
    masters = optimizer.master_state_dict()
    for value, kept in zip(values, before, strict=True):
        value.copy_(kept)
    stored = StoredTensors(latest_checkpoint(folder))
    return all(
        torch.equal(stored.mmap_chunk(key, offset, tuple(values.shape)), values)
        for key, pieces in masters.items()
        for offset, values in pieces.chunks
        if "bias" not in key
    )


def test_what_is_saved_is_what_was_there(pool, tmp_path):
    """Training changes the weights while they are written."""
    run = recipe(keep_checkpoints=2, keep_every_steps=3)
    assert pool.run(1, save_then_change, run, tmp_path) == [True]
    assert [checkpoint_step(folder) for folder in complete_checkpoints(tmp_path)] == [3, 5, 6]


@pytest.mark.parametrize(
    ("train", "left"),
    [
        ({"keep_checkpoints": 2}, [5, 6]),
        ({"keep_checkpoints": 0}, [1, 2, 3, 4, 5, 6]),
        ({"keep_checkpoints": 1, "keep_every_steps": 2}, [2, 4, 6]),
        ({"keep_checkpoints": 2, "spike_policy": "rollback", "rollback_steps": 4, "save_every_steps": 4}, [3, 5, 6]),
    ],
)
def test_which_are_kept(tmp_path, train, left):
    """The rollback of a spike in step 7 goes to step 3, although saves came more often than planned."""
    for step in range(1, 8):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / "state.json").touch()
    apply_retention(tmp_path / "step-00000006", recipe(**train).train)
    assert [checkpoint_step(folder) for folder in complete_checkpoints(tmp_path)] == [*left, 7]


def test_latest_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    """The checkpoint that was there before under the same name stays."""
    for name in (".step-00000004.part", "step-00000004"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "latest").mkdir()  # which a file cannot replace
    with pytest.raises(OSError, match="latest"):
        commit_checkpoint(tmp_path / ".step-00000004.part", tmp_path / "step-00000004", {})
    assert (tmp_path / "step-00000004" / "file").read_text() == "step-00000004"
    assert (tmp_path / ".step-00000004.part" / "file").is_file()
    assert not (tmp_path / ".step-00000004.old.part").exists()


def train(tiny_run, runs, steps, **options):
    return command(
        "pretrain",
        tiny_run.recipe,
        f"runs_folder={runs}",
        "parallel.num_processes=2",
        f"train.train_steps={steps}",
        "train.save_every_steps=2",
        f"train.validate_every_steps={steps}",
        **options,
    )


def workers_of(process, folder):
    """The processes that train, by rank, once they do."""
    deadline = time.monotonic() + 150
    while not read_metrics(folder):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)
        time.sleep(0.1)
    return {worker.environ()["RANK"]: worker for worker in psutil.Process(process.pid).children()}


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "nbytes"), [(1, SMALL_BYTES), (0, 1000)])
def test_a_disk_that_is_full_for_a_while(tiny_run, tmp_path, rank, nbytes):
    """For the second process, which writes a checkpoint's file alone, or for the first, which writes metrics too."""
    process = train(tiny_run, tmp_path, 60)
    try:
        worker = workers_of(process, tmp_path / "tiny")[str(rank)]
        largest_file(nbytes, worker.pid)
        said = []
        for line in process.stderr:
            said.append(line)
            if "could not be written" in line:
                break
        largest_file(None, worker.pid)
        _, rest = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 0, rest
    assert "File too large" in said[-1] and "training continues" in said[-1] and said[-1].startswith("warning")
    assert ("process 1: " in said[-1]) == (rank == 1)
    assert "saved in" in rest
    check_finished(tmp_path / "tiny", 60)
    metrics = read_metrics(tmp_path / "tiny")
    assert all("time/save_pause_seconds" in entry for entry in metrics if entry["step"] % 2 and entry["step"] > 1)


def check_finished(folder, steps):
    assert open_checkpoint(folder).state.step == steps
    assert not list((folder / "checkpoints").glob(".*"))
    assert [entry["step"] for entry in read_metrics(folder)] == list(range(1, steps + 1))


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(tiny_run, tmp_path):
    """All processes are stopped at once, so that it is certain that one was."""
    process = train(tiny_run, tmp_path, 100)
    checkpoints = tmp_path / "tiny" / "checkpoints"
    try:
        workers = workers_of(process, tmp_path / "tiny").values()
        while True:
            assert process.poll() is None
            if list(checkpoints.glob(".step-*[0-9].part")) and list(checkpoints.glob("step-*")):
                for worker in workers:
                    worker.suspend()
                if left := list(checkpoints.glob(".step-*[0-9].part")):
                    break
                for worker in workers:
                    worker.resume()
            time.sleep(0.001)
        complete = complete_checkpoints(checkpoints)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        for worker in workers:
            worker.kill()
        process.wait()
    assert left[0].is_dir()
    process = train(tiny_run, tmp_path, 100)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert f"resuming after step {checkpoint_step(complete[-1])} of 100" in err
    check_finished(tmp_path / "tiny", 100)


@pytest.mark.slow
def test_a_last_save_that_fails_is_an_error(tiny_run, runs):
    checkpoints = runs / "tiny" / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000004")
    (checkpoints / "latest").write_text("step-00000002")
    code, _, err = run_command("pretrain", tiny_run.recipe, f"runs_folder={runs}", largest_file=SMALL_BYTES)
    check_line(code, err.splitlines(keepends=True)[-1], ("step-00000004 could not be written", "rerun the command"))
    assert latest_checkpoint(checkpoints).name == "step-00000002"
