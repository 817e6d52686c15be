"""`moonlight bench checkpoint`: how long a save keeps training waiting, and how fast it writes.

One process saves a model of random weights by Muon's optimizer, with the class that a run uses, on the disk of the
current folder. The cases take turns: saving beside a training step, saving by a thread with nothing beside it, saving
while training waits, the same bytes written in large blocks past the page cache, which is what the disk can do, or
through it and flushed, torch.save of the same tensors into one file, flushed, and torch's own distributed checkpoint of
them, flushed. The disk of a shared machine is a noisy witness, so the CPU time of all threads stands beside the wall
time. Before any figure counts, what was saved is read back by torch's own reader of distributed checkpoints, and
compared bit for bit.

Every case begins with a flushed disk, and some seconds after the files of the one before were removed. On a virtual
machine, what writes into the page cache is several times as fast while it finds the memory of a file that was removed
just before, which no training run has.
"""

import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.models.gpt import GPTModel

from moonlight import parallel
from moonlight.bench.report import hardware, print_results, time_ratio, told_rounds
from moonlight.config.load import load_recipe
from moonlight.config.parallel import ParallelConfig
from moonlight.config.run import RunConfig
from moonlight.config.timeline import RunSchedule
from moonlight.dist_checkpoint.async_save import PAUSE, AsyncCheckpointer
from moonlight.dist_checkpoint.direct_io import DirectFile
from moonlight.dist_checkpoint.state import TrainState, step_folder
from moonlight.files import check_space
from moonlight.model.build import build_model
from moonlight.model.shards import init_weights
from moonlight.optim.distributed_muon import DistributedMuon, build_optimizer
from moonlight.train.forward_backward import MicroBatch
from moonlight.train.step import train_step

PAUSE_BAR = 10.0
"""Pause of a synchronous save over that of an asynchronous one."""
THROUGHPUT_BAR, THROUGHPUT_AIM = 0.9, 1.0
"""Time of writing the same bytes over that of a save."""
TORCH_SAVE_BAR, TORCH_SAVE_AIM = 5.0, 8.0
"""Time of torch.save over that of a save."""
BLOCK_BYTES = 8 * 2**20
COPIES_ON_DISK = 4
SECONDS_TO_SETTLE = 5.0
SEQUENCE_LENGTH = 256
"""Of the one sequence of the training step."""
VOCAB_SIZE = 16384
"""A small one, so that most of the bytes are experts, as they are in a large model."""
SAVE_ROOM = 1.2
PEERS = {"direct": "the disk alone", "raw": "write + fsync", "torch.save": "torch.save + fsync", "DCP": "torch's DCP"}
CPU = ", CPU"
"""After the name of a case: its CPU time."""


def bench_checkpoint(rounds: int, layers: int, recipe: Path, json_path: Path | None = None) -> bool:
    """Measure, print the table, and return whether every gate and bar has passed."""
    overrides = {"model.num_hidden_layers": layers, "model.vocab_size": VOCAB_SIZE, "train.global_batch_size": 1}
    overrides |= {"train.micro_batch_size": 1, "data.sequence_length": SEQUENCE_LENGTH}
    config = load_recipe(recipe, [f"{key}={value}" for key, value in overrides.items()])
    config = replace(config, parallel=ParallelConfig())
    waiting = replace(config, train=replace(config.train, async_save=False, keep_checkpoints=0))
    beside = replace(waiting, train=replace(waiting.train, async_save=True))
    parallel.init_single_process()
    try:
        parallel.init_model_parallel(config.parallel, config.train.seed)
        models = build_model(config)
        optimizer = build_optimizer(models, config)
        tensors = {
            f"{key} {offset}": values
            for key, pieces in (optimizer.master_state_dict() | optimizer.optimizer_state_dict()).items()
            for offset, values in pieces.chunks
        }
        with optimizer.loading_masters() as masters:
            init_weights(masters, config.model, config.train.seed)
        for pieces in optimizer.optimizer_state_dict().values():
            for _, values in pieces.chunks:
                values.uniform_(to=1e-3)  # no less than 0, as a mean of squares
        nbytes = sum(values.nbytes for values in tensors.values())
        check_space(Path.cwd(), int(COPIES_ON_DISK * SAVE_ROOM * nbytes))
        with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as place:
            folder = Path(place)
            savers = {
                name: AsyncCheckpointer(folder / name, of, optimizer, tokenizer_sha256="")
                for name, of in (("beside", beside), ("waiting", waiting))
            }
            times: dict[str, list[float]] = defaultdict(list)
            content = torch.cat(
                [values.contiguous().flatten().view(torch.uint8) for values in tensors.values()]
            ).numpy()
            for step in (number + 1 for number in told_rounds(rounds)):
                found = _round(folder, savers, partial(_train_step, models, optimizer, config), step, content, tensors)
                if step > 1:  # the first warms up
                    for name, seconds in found.items():
                        times[name].append(seconds)
            same = all(_is_equal(step_folder(folder / name, rounds + 1), optimizer) for name in savers)
    finally:
        parallel.destroy_distributed()
    waited = {peer: (times["waiting"], times[peer]) for peer in PEERS}
    worked = {peer: (times["waiting" + CPU], times[peer + CPU]) for peer in waited}
    figures = [
        replace(
            time_ratio("asynchronous pause, synchronous save", times["pause"], times["waiting"], PAUSE_BAR, same, "s"),
            own_limit=True,
        ),
        time_ratio("training step beside a save, without one", times["step beside"], times["step"], 0.0, same, "s"),
        time_ratio(
            "asynchronous save, write + fsync", times["beside"], times["raw"], THROUGHPUT_BAR, same, "s", THROUGHPUT_AIM
        ),
        time_ratio("synchronous save, the disk alone (O_DIRECT)", *waited["direct"], 0.0, same, "s"),
        time_ratio("synchronous save, write + fsync", *waited["raw"], THROUGHPUT_BAR, same, "s", THROUGHPUT_AIM),
        time_ratio(
            "synchronous save, torch.save + fsync", *waited["torch.save"], TORCH_SAVE_BAR, same, "s", TORCH_SAVE_AIM
        ),
        time_ratio("synchronous save, torch's DCP", *waited["DCP"], 0.0, same, "s"),
        *(
            time_ratio(f"synchronous save, CPU time, {PEERS[peer]}", *pair, 0.0, same, "s")
            for peer, pair in worked.items()
        ),
    ]
    notes = [
        f"{nbytes / 1e9:.2f} GB of state in {len(tensors)} tensors, {rounds} rounds after one to warm up",
        f"saved, and read by torch.distributed.checkpoint: {'the same bits' if same else 'DIFFERENT'}",
    ]
    return print_results("Checkpoints", figures, hardware("cpu"), notes, json_path)


def _round(
    folder: Path,
    savers: dict[str, AsyncCheckpointer],
    train: Callable[[Callable[[], None]], None],
    step: int,
    content: Any,
    tensors: dict[str, torch.Tensor],
) -> dict[str, float]:
    """Wall and CPU seconds of every case."""
    raw, peer, torch_folder, state = folder / "raw", folder / "peer", folder / "dcp", TrainState(step=step)
    found: dict[str, float] = {}

    def measure(name: str, call: Callable[[], object]) -> None:
        os.sync()
        time.sleep(SECONDS_TO_SETTLE)
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        found[name], found[name + CPU] = time.perf_counter() - wall, time.process_time() - cpu

    def save(name: str) -> None:
        savers[name].save(state)
        savers[name].finalize()

    def save_and_train() -> None:
        savers["beside"].save(state)
        train(savers["beside"].wait_until_staged)

    measure("step", lambda: train(lambda: None))
    savers["beside"].pop_metrics()
    measure("step beside", save_and_train)
    savers["beside"].finalize()
    found["pause"] = savers["beside"].pop_metrics()[PAUSE]
    shutil.rmtree(step_folder(folder / "beside", step))
    measure("beside", lambda: save("beside"))
    measure("raw", lambda: _write_blocks(raw, content))
    raw.unlink()
    measure("direct", lambda: _write_direct(raw, content))
    raw.unlink()
    measure("waiting", lambda: save("waiting"))
    measure("torch.save", lambda: _torch_save(peer, tensors))
    peer.unlink()
    writer = dcp.FileSystemWriter(torch_folder, sync_files=True)
    measure("DCP", lambda: dcp.save(tensors, storage_writer=writer, no_dist=True))
    shutil.rmtree(torch_folder)
    for name in savers:
        shutil.rmtree(step_folder(folder / name, step - 1), ignore_errors=True)  # the last ones are still to be read
    return found


def _train_step(
    models: list[GPTModel], optimizer: DistributedMuon, config: RunConfig, before_update: Callable[[], None]
) -> None:
    tokens = torch.randint(0, VOCAB_SIZE, (1, SEQUENCE_LENGTH + 1))
    batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], torch.ones(1, SEQUENCE_LENGTH))
    train_step(models, optimizer, config, [batch], RunSchedule(config).at(1), before_update=before_update)


def _write_blocks(path: Path, content: Any) -> None:
    with path.open("wb", buffering=0) as file:
        for begin in range(0, len(content), BLOCK_BYTES):
            file.write(content[begin : begin + BLOCK_BYTES])
        os.fsync(file.fileno())


def _write_direct(path: Path, content: Any) -> None:
    with DirectFile(path) as file:
        file.write(content.data)
        file.sync()


def _torch_save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with path.open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


def _is_equal(folder: Path, optimizer: DistributedMuon) -> bool:
    """Whether torch's own reader finds every bit of the state."""
    state = optimizer.master_state_dict() | optimizer.optimizer_state_dict()
    wholes = {key: torch.empty(pieces.shape, dtype=pieces.chunks[0][1].dtype) for key, pieces in state.items()}
    dcp.load(wholes, checkpoint_id=folder, no_dist=True)
    return all(
        torch.equal(wholes[key][tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))], values)
        for key, pieces in state.items()
        for offset, values in pieces.chunks
    )
