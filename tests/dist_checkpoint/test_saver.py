"""Saves that fail during training: a full disk, a killed process, a rank that cannot write."""

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
"""More than the size of metrics and logs, and less than that of a checkpoint's file."""


def limit_file_size(nbytes, pid=0):
    """Limit the files of a process to `nbytes`, like a full disk; existing files stay."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard if nbytes is None else nbytes, hard))


def make_checkpointer(config, folder):
    _, optimizer = build(config)
    return AsyncCheckpointer(folder, config, optimizer, tokenizer_sha256="abc"), optimizer


def count_joined_masters(config, folder):
    """Return the largest number of float32 copies of split masters alive during a save, and their total number."""
    _, optimizer = build(config)
    created, max_alive = [], 0
    original = master.join_halves

    def join(*halves):
        nonlocal max_alive
        joined = original(*halves)
        created.append(StorageWeakRef(joined.untyped_storage()))
        max_alive = max(max_alive, sum(not storage.expired() for storage in created))
        return joined

    with mock.patch.object(master, "join_halves", join):
        checkpointer = AsyncCheckpointer(folder, config, optimizer, tokenizer_sha256="abc")
        checkpointer.save(TrainState(step=1))
        checkpointer.finalize()
    return max_alive, len(created)


@pytest.mark.parametrize("async_save", (True, False))
def test_a_save_joins_split_masters_one_at_a_time(pool, tmp_path, async_save):
    config = recipe(dtype="bfloat16", async_save=async_save)
    config = replace(config, optimizer=replace(config.optimizer, master_weights="split"))
    ((max_alive, created),) = pool.run(1, count_joined_masters, config, tmp_path)
    assert max_alive <= 2 and created > 10


def save_with_failing_rank(config, folder, failing):
    """Save three times, with the second and third write failing on rank `failing`; return messages and stored files."""
    checkpointer, _ = make_checkpointer(config, folder)
    messages = []
    for step in (1, 2):
        if step == 2 and torch.distributed.get_rank() == failing:
            limit_file_size(SMALL_BYTES)
        checkpointer.save(TrainState(step=step))
        if step == 1:
            checkpointer.finalize()
    checkpointer.save(TrainState(step=3))
    try:
        checkpointer.finalize()
    except UserError as error:
        messages.append(str(error))
    finally:
        limit_file_size(None)
    messages += [event.text for event in checkpointer.pop_events()]
    names = sorted(path.name for path in folder.iterdir())
    torch.distributed.barrier()
    checkpointer.save(TrainState(step=4))
    checkpointer.finalize()
    assert {"time/save_pause_seconds"} <= checkpointer.pop_metrics().keys()
    return messages, names


@pytest.mark.parametrize(("failing", "async_save"), [(0, True), (1, True), (1, False)])
def test_a_rank_that_cannot_write(pool, tmp_path, failing, async_save):
    config = recipe(LAYOUTS["DP2"][1], async_save=async_save)
    (first, names), (second, _) = pool.run(2, save_with_failing_rank, config, tmp_path, failing)
    error, *messages = first
    assert second == [error]
    assert f"checkpoint {tmp_path / 'step-00000003'} could not be written" in error
    assert f"process {failing}: File too large; the disk, or the limit that `ulimit -f` shows" in error
    assert names == ["latest", "step-00000001"]
    (warning,) = [text for text in messages if text.startswith(f"warning: checkpoint {tmp_path / 'step-00000002'}")]
    assert "training continues, and the next save runs on schedule" in warning and f"process {failing}:" in warning
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000004"
    assert not list(tmp_path.glob(".step-*"))


def save_then_change(config, folder):
    """Return whether the last checkpoint has the weights from the start of its save.

    The weights change as soon as they are staged.
    """
    checkpointer, optimizer = make_checkpointer(config, folder)
    values = [owned.master_weight.to_float32() for owned in optimizer.owned]
    before = [value.clone() for value in values]
    for step in range(1, 7):
        checkpointer.save(TrainState(step=step))
        checkpointer.wait_until_staged()
        for value, expected in zip(values, before, strict=True):
            value.add_(1)
            expected.add_(step < 6)
    checkpointer.finalize()
    verify_checkpoint(latest_checkpoint(folder))
    masters = optimizer.master_state_dict()
    for value, expected in zip(values, before, strict=True):
        value.copy_(expected)
    stored = StoredTensors(latest_checkpoint(folder))
    return all(
        torch.equal(stored.mmap_chunk(key, offset, tuple(values.shape)), values)
        for key, chunks in masters.items()
        for offset, values in chunks.chunks
        if "bias" not in key
    )


def test_a_save_holds_the_weights_of_its_step(pool, tmp_path):
    """Weights that change during a save must not change the checkpoint."""
    config = recipe(keep_checkpoints=2, keep_every_steps=3)
    assert pool.run(1, save_then_change, config, tmp_path) == [True]
    assert [checkpoint_step(folder) for folder in complete_checkpoints(tmp_path)] == [3, 5, 6]


@pytest.mark.parametrize(
    ("train", "kept_steps"),
    [
        ({"keep_checkpoints": 2}, [5, 6]),
        ({"keep_checkpoints": 0}, [1, 2, 3, 4, 5, 6]),
        ({"keep_checkpoints": 1, "keep_every_steps": 2}, [2, 4, 6]),
        ({"keep_checkpoints": 2, "spike_policy": "rollback", "rollback_steps": 4, "save_every_steps": 4}, [3, 5, 6]),
    ],
)
def test_retention(tmp_path, train, kept_steps):
    """Retention must keep step 3 for the rollback of a spike in step 7, even with extra saves."""
    for step in range(1, 8):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / "state.json").touch()
    apply_retention(tmp_path / "step-00000006", recipe(**train).train)
    assert [checkpoint_step(folder) for folder in complete_checkpoints(tmp_path)] == [*kept_steps, 7]


def test_a_failed_write_of_latest_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    """The existing checkpoint of the same name must stay."""
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
    """Wait until the run trains, and return its training processes by rank."""
    deadline = time.monotonic() + 150
    while not read_metrics(folder):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)
        time.sleep(0.1)
    return {worker.environ()["RANK"]: worker for worker in psutil.Process(process.pid).children()}


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "nbytes"), [(1, SMALL_BYTES), (0, 1000)])
def test_a_disk_that_is_full_temporarily(tiny_run, tmp_path, rank, nbytes):
    """The disk is full for rank 1, which writes only checkpoint files, or for rank 0, which also writes metrics."""
    process = train(tiny_run, tmp_path, 60)
    try:
        worker = workers_of(process, tmp_path / "tiny")[str(rank)]
        limit_file_size(nbytes, worker.pid)
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "could not be written" in line:
                break
        limit_file_size(None, worker.pid)
        _, rest = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 0, rest
    assert "File too large" in lines[-1] and "training continues" in lines[-1] and lines[-1].startswith("warning")
    assert ("process 1: " in lines[-1]) == (rank == 1)
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
    """The processes are suspended first, so that a save is certainly in flight when they are killed."""
    process = train(tiny_run, tmp_path, 100)
    checkpoints = tmp_path / "tiny" / "checkpoints"
    try:
        workers = workers_of(process, tmp_path / "tiny").values()
        while True:
            assert process.poll() is None
            if list(checkpoints.glob(".step-*[0-9].part")) and list(checkpoints.glob("step-*")):
                for worker in workers:
                    worker.suspend()
                if partial := list(checkpoints.glob(".step-*[0-9].part")):
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
    assert partial[0].is_dir()
    process = train(tiny_run, tmp_path, 100)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert f"resuming after step {checkpoint_step(complete[-1])} of 100" in err
    check_finished(tmp_path / "tiny", 100)


@pytest.mark.slow
def test_a_failed_last_save_is_an_error(tiny_run, runs):
    checkpoints = runs / "tiny" / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000004")
    (checkpoints / "latest").write_text("step-00000002")
    code, _, err = run_command("pretrain", tiny_run.recipe, f"runs_folder={runs}", largest_file=SMALL_BYTES)
    check_line(code, err.splitlines(keepends=True)[-1], ("step-00000004 could not be written", "rerun the command"))
    assert latest_checkpoint(checkpoints).name == "step-00000002"
