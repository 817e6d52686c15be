"""`moonlight bench checkpoint`: time that a save pauses training, and write throughput.

One process saves a model with random weights and Muon's optimizer to the disk of the current folder, with the class
that a run uses. The cases take turns:

- a save during a training step
- an asynchronous save alone
- a synchronous save
- the same bytes written in large blocks without the page cache, which is the limit of the disk
- the same bytes written through the page cache and flushed
- torch.save of the same tensors to one file, flushed
- torch's distributed checkpoint of the same tensors, flushed

The disk of a shared machine is noisy, so the benchmark measures the CPU time of all threads in addition to wall time.
The gate: torch's reader of distributed checkpoints reads the saved state back, bit-identically.

Every case starts with a flushed disk, some seconds after the files of the previous case were deleted. On a virtual
machine, writes to the page cache are several times as fast if they reuse the memory of a file that was just deleted. No
training run has this advantage.
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
from moonlight.bench.monitors import build_initialized
from moonlight.bench.report import BenchResult, hardware, iter_rounds, print_results, time_ratio
from moonlight.config.load import load_recipe
from moonlight.config.parallel import ParallelConfig
from moonlight.config.run import RunConfig
from moonlight.config.timeline import RunSchedule
from moonlight.dist_checkpoint.async_save import PAUSE, AsyncCheckpointer
from moonlight.dist_checkpoint.direct_io import DirectFile
from moonlight.dist_checkpoint.state import TrainState, step_folder
from moonlight.files import check_space
from moonlight.optim.distributed_muon import DistributedMuon
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
SETTLE_SECONDS = 5.0
SEQUENCE_LENGTH = 256
"""Tokens of the training step's only sequence."""
VOCAB_SIZE = 16384
"""A small vocabulary, so that experts take most of the bytes, as in a large model."""
FREE_SPACE_FACTOR = 1.2
PEERS = {"direct": "the disk alone", "raw": "write + fsync", "torch.save": "torch.save + fsync", "DCP": "torch's DCP"}
CPU = ", CPU"
"""Suffix of a case's name for its CPU time."""


def bench_checkpoint(rounds: int, layers: int, recipe: Path, json_path: Path | None = None) -> bool:
    """Run the benchmark, print its table, and return whether every result passed."""
    overrides = {"model.num_hidden_layers": layers, "model.vocab_size": VOCAB_SIZE, "train.global_batch_size": 1}
    overrides |= {"train.micro_batch_size": 1, "data.sequence_length": SEQUENCE_LENGTH}
    config = load_recipe(recipe, [f"{key}={value}" for key, value in overrides.items()])
    config = replace(config, parallel=ParallelConfig())
    sync_config = replace(config, train=replace(config.train, async_save=False, keep_checkpoints=0))
    async_config = replace(sync_config, train=replace(sync_config.train, async_save=True))
    parallel.init_single_process()
    try:
        model_chunks, optimizer = build_initialized(config)
        tensors = {
            f"{key} {offset}": values
            for key, local_chunks in (optimizer.master_state_dict() | optimizer.optimizer_state_dict()).items()
            for offset, values in local_chunks.chunks
        }
        for local_chunks in optimizer.optimizer_state_dict().values():
            for _, values in local_chunks.chunks:
                values.uniform_(to=1e-3)  # non-negative, as a mean of squares
        nbytes = sum(values.nbytes for values in tensors.values())
        check_space(Path.cwd(), int(COPIES_ON_DISK * FREE_SPACE_FACTOR * nbytes))
        with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as temporary_folder:
            folder = Path(temporary_folder)
            checkpointers = {
                name: AsyncCheckpointer(folder / name, save_config, optimizer, tokenizer_sha256="")
                for name, save_config in (("async", async_config), ("sync", sync_config))
            }
            times: dict[str, list[float]] = defaultdict(list)
            all_bytes = [values.contiguous().flatten().view(torch.uint8) for values in tensors.values()]
            content = torch.cat(all_bytes).numpy()
            train = partial(_train_step, model_chunks, optimizer, config)
            for round_index in iter_rounds(rounds):
                round_times = _round(folder, checkpointers, train, round_index + 1, content, tensors)
                if round_index:  # the first warms up
                    for name, seconds in round_times.items():
                        times[name].append(seconds)
            is_equal = all(_is_equal(step_folder(folder / name, rounds + 1), optimizer) for name in checkpointers)
    finally:
        parallel.destroy_distributed()

    def compare(case: str, ours: str, peer: str, bar: float = 0.0, aim: float | None = None) -> BenchResult:
        return time_ratio(case, times[ours], times[peer], bar, is_equal, "s", aim)

    results = [
        replace(compare("asynchronous pause, synchronous save", "pause", "sync", PAUSE_BAR), own_limit=True),
        compare("training step beside a save, without one", "step during save", "step"),
        compare("asynchronous save, write + fsync", "async", "raw", THROUGHPUT_BAR, THROUGHPUT_AIM),
        compare("synchronous save, the disk alone (O_DIRECT)", "sync", "direct"),
        compare("synchronous save, write + fsync", "sync", "raw", THROUGHPUT_BAR, THROUGHPUT_AIM),
        compare("synchronous save, torch.save + fsync", "sync", "torch.save", TORCH_SAVE_BAR, TORCH_SAVE_AIM),
        compare("synchronous save, torch's DCP", "sync", "DCP"),
        *(compare(f"synchronous save, CPU time, {name}", "sync" + CPU, peer + CPU) for peer, name in PEERS.items()),
    ]
    notes = [
        f"{nbytes / 1e9:.2f} GB of state in {len(tensors)} tensors, {rounds} rounds after one warm-up round",
        f"state read back by torch.distributed.checkpoint: {'bit-identical' if is_equal else 'DIFFERENT'}",
    ]
    return print_results("Checkpoints", results, hardware("cpu"), notes, json_path)


def _round(
    folder: Path,
    checkpointers: dict[str, AsyncCheckpointer],
    train: Callable[[Callable[[], None]], None],
    step: int,
    content: Any,
    tensors: dict[str, torch.Tensor],
) -> dict[str, float]:
    """Run every case once and return its wall and CPU seconds by name."""
    raw, peer, torch_folder, state = folder / "raw", folder / "peer", folder / "dcp", TrainState(step=step)
    times: dict[str, float] = {}

    def measure(name: str, call: Callable[[], object]) -> None:
        os.sync()
        time.sleep(SETTLE_SECONDS)
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        times[name], times[name + CPU] = time.perf_counter() - wall, time.process_time() - cpu

    def save(name: str) -> None:
        checkpointers[name].save(state)
        checkpointers[name].finalize()

    def save_and_train() -> None:
        checkpointers["async"].save(state)
        train(checkpointers["async"].wait_until_staged)

    measure("step", lambda: train(lambda: None))
    checkpointers["async"].pop_metrics()
    measure("step during save", save_and_train)
    checkpointers["async"].finalize()
    times["pause"] = checkpointers["async"].pop_metrics()[PAUSE]
    shutil.rmtree(step_folder(folder / "async", step))
    measure("async", lambda: save("async"))
    measure("raw", lambda: _write_blocks(raw, content))
    raw.unlink()
    measure("direct", lambda: _write_direct(raw, content))
    raw.unlink()
    measure("sync", lambda: save("sync"))
    measure("torch.save", lambda: _torch_save(peer, tensors))
    peer.unlink()
    writer = dcp.FileSystemWriter(torch_folder, sync_files=True)
    measure("DCP", lambda: dcp.save(tensors, storage_writer=writer, no_dist=True))
    shutil.rmtree(torch_folder)
    for name in checkpointers:
        shutil.rmtree(step_folder(folder / name, step - 1), ignore_errors=True)  # the gate reads the last ones
    return times


def _train_step(
    model_chunks: list[GPTModel], optimizer: DistributedMuon, config: RunConfig, before_update: Callable[[], None]
) -> None:
    tokens = torch.randint(0, VOCAB_SIZE, (1, SEQUENCE_LENGTH + 1))
    batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], torch.ones(1, SEQUENCE_LENGTH))
    train_step(model_chunks, optimizer, config, [batch], RunSchedule(config).at(1), before_update=before_update)


def _write_blocks(path: Path, content: Any) -> None:
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(content), BLOCK_BYTES):
            file.write(content[start : start + BLOCK_BYTES])
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
    """Return whether torch's reader reads the optimizer's state bit-identically from `folder`."""
    state = optimizer.master_state_dict() | optimizer.optimizer_state_dict()
    tensors = {key: torch.empty(stored.shape, dtype=stored.chunks[0][1].dtype) for key, stored in state.items()}
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return all(
        torch.equal(tensors[key][tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))], values)
        for key, local_chunks in state.items()
        for offset, values in local_chunks.chunks
    )
