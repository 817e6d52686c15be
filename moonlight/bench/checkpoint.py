"""`moonlight bench checkpoint`: how long a save keeps training waiting, and how fast it writes.

One process saves a model of random weights by Muon's optimizer, with the class that a run uses, on the disk of the
current folder. The cases take turns: saving beside training, saving while training waits, the same bytes written in
large blocks and flushed, and torch.save of the same tensors into one file, flushed. Before any figure counts, what was
saved is read back by torch's own reader of distributed checkpoints, and compared bit for bit.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from moonlight import parallel
from moonlight.bench.report import Figure, hardware, report, speed
from moonlight.config import Parallel
from moonlight.config_io import load_recipe
from moonlight.errors import UserError
from moonlight.files import check_space
from moonlight.model.build import build_model
from moonlight.optim.sharded import ShardedOptimizer, make_optimizer
from moonlight.train.checkpoint_files import TrainState, step_folder
from moonlight.train.saver import Saver

PAUSE_BAR = 10.0
"""Pause of a synchronous save over that of an asynchronous one."""
THROUGHPUT_BAR = 0.9
"""Time of writing the same bytes over that of a save."""
BLOCK_BYTES = 8 * 2**20
COPIES_ON_DISK = 4
VOCAB_SIZE = 16384
"""A small one, so that most of the bytes are experts, as they are in a large model."""
SAVE_ROOM = 1.2


def bench_checkpoint(rounds: int, layers: int, recipe: Path, json_path: Path | None = None) -> bool:
    """Measure, print the table, and return whether every gate and bar has passed."""
    if rounds < 1 or layers < 2:
        raise UserError(f"--rounds is {rounds} and --layers {layers}: at least 1 and 2 are accepted")
    run = load_recipe(recipe, [f"model.num_hidden_layers={layers}", f"model.vocab_size={VOCAB_SIZE}"])
    run = replace(run, parallel=Parallel())
    waiting = replace(run, train=replace(run.train, async_save=False, keep_checkpoints=1))
    beside = replace(waiting, train=replace(waiting.train, async_save=True))
    parallel.join_alone()
    try:
        parallel.build_groups(run.parallel, run.train.seed)
        optimizer = make_optimizer(build_model(run), run)
        tensors = {
            f"{key} {offset}": values
            for key, pieces in (optimizer.master_state() | optimizer.momentum_state()).items()
            for offset, values in pieces.rectangles
        }
        for values in tensors.values():
            values.normal_()
        nbytes = sum(values.nbytes for values in tensors.values())
        check_space(Path.cwd(), int(COPIES_ON_DISK * SAVE_ROOM * nbytes))
        with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as place:
            folder = Path(place)
            savers = {
                name: Saver(folder / name, of, optimizer, tokenizer_sha256="")
                for name, of in (("beside", beside), ("waiting", waiting))
            }
            times: dict[str, list[float]] = {name: [] for name in ("pause", "beside", "waiting", "raw", "torch.save")}
            content = torch.cat(
                [values.contiguous().flatten().view(torch.uint8) for values in tensors.values()]
            ).numpy()
            for step in range(1, rounds + 2):
                found = _round(folder, savers, step, content, tensors)
                if step > 1:  # the first warms up
                    for name, seconds in found.items():
                        times[name].append(seconds)
            same = all(_is_equal(step_folder(folder / name, rounds + 1), optimizer) for name in savers)
    finally:
        parallel.leave_world()
    figures = [
        speed(
            "asynchronous pause, synchronous save",
            times["pause"],
            times["waiting"],
            PAUSE_BAR,
            same,
            "s",
        ),
        speed("asynchronous save, write + fsync", times["beside"], times["raw"], THROUGHPUT_BAR, same, "s"),
        speed("synchronous save, write + fsync", times["waiting"], times["raw"], THROUGHPUT_BAR, same, "s"),
        _beside_torch_save(times, same),
    ]
    notes = [
        f"{nbytes / 1e9:.2f} GB of state in {len(tensors)} tensors, {rounds} rounds after one to warm up",
        f"saved, and read by torch.distributed.checkpoint: {'the same bits' if same else 'DIFFERENT'}",
    ]
    return report("Checkpoints", figures, hardware("cpu"), notes, json_path)


def _beside_torch_save(times: dict[str, list[float]], same: bool) -> Figure:
    """For information: it has no bar but that of being the same."""
    return speed("synchronous save, torch.save + fsync", times["waiting"], times["torch.save"], 0.0, same, "s")


def _round(
    folder: Path, savers: dict[str, Saver], step: int, content: Any, tensors: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Seconds of every case, each on a disk that has nothing left to write."""
    found = {}
    os.sync()
    started = time.perf_counter()
    found["pause"] = savers["beside"].save(TrainState(step=step))
    savers["beside"].finish()
    found["beside"] = time.perf_counter() - started
    os.sync()
    found["raw"] = _seconds(lambda: _write_blocks(folder / "raw", content))
    os.sync()
    started = time.perf_counter()
    savers["waiting"].save(TrainState(step=step))
    savers["waiting"].finish()
    found["waiting"] = time.perf_counter() - started
    os.sync()
    found["torch.save"] = _seconds(lambda: _torch_save(folder / "peer", tensors))
    (folder / "raw").unlink()
    (folder / "peer").unlink()
    for name in savers:
        shutil.rmtree(step_folder(folder / name, step - 1), ignore_errors=True)
    return found


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _write_blocks(path: Path, content: Any) -> None:
    with path.open("wb", buffering=0) as file:
        for begin in range(0, len(content), BLOCK_BYTES):
            file.write(content[begin : begin + BLOCK_BYTES])
        os.fsync(file.fileno())


def _torch_save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with path.open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


def _is_equal(folder: Path, optimizer: ShardedOptimizer) -> bool:
    """Whether torch's own reader finds every bit of the state."""
    state = optimizer.master_state() | optimizer.momentum_state()
    wholes = {key: torch.empty(pieces.shape, dtype=pieces.rectangles[0][1].dtype) for key, pieces in state.items()}
    dcp.load(wholes, checkpoint_id=folder, no_dist=True)
    return all(
        torch.equal(wholes[key][tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))], values)
        for key, pieces in state.items()
        for offset, values in pieces.rectangles
    )
