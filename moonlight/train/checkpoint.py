"""Saving and loading checkpoints: whole tensors under their own names, written by all ranks, complete or absent.

Weights are float32 masters under the names of `moonlight.mapping`, momenta under `optimizer.<momentum>.<name>`. Nothing
depends on the layout that wrote it. See `checkpoint_files` for the files.
"""

import dataclasses
import queue
import shutil
from pathlib import Path
from typing import Any

import moonlight.cpu  # noqa: F401  (stand-ins, before Megatron)

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from moonlight.config import Run
from moonlight.files import fsync, sha256_of, write_json, write_text
from moonlight.optim.replicated import ReplicatedOptimizer
from moonlight.train.checkpoint_files import (
    LATEST_FILE,
    STATE_FILE,
    TrainState,
    check_model,
    read_state,
    step_folder,
)
from moonlight.train.index import check_pickles


class _InProcessWriter(FileSystemWriterAsync):
    """Writes files in this process.

    Megatron's own forks a process per file, though threads are running, and keeps a manager process that would
    outlive a killed run.
    """

    @staticmethod
    def write_preloaded_data_multiproc(
        transform_list: list, use_msc: bool, rank: int, write_buckets: list, global_results_queue: Any
    ) -> None:
        results: dict[int, Any] | Exception = {}
        for index, bucket in enumerate(write_buckets):
            outcomes, counter = queue.Queue[Any](), queue.Queue[int]()
            counter.put(index)
            FileSystemWriterAsync.write_preloaded_data(transform_list, index, bucket, outcomes, counter, True)
            _, outcome = outcomes.get()
            if isinstance(outcome, Exception):
                results = outcome
                break
            assert isinstance(results, dict)
            results[index] = outcome
        global_results_queue.put(results)


torch_strategy.FileSystemWriterAsync = _InProcessWriter
filesystem_async._results_queue = queue.SimpleQueue()


def save(checkpoints: Path, run: Run, optimizer: ReplicatedOptimizer, state: TrainState) -> Path:
    """Write a checkpoint by all ranks; `latest` moves only once it is on the disk. Old ones are removed after that."""
    final = step_folder(checkpoints, state.step)
    part = checkpoints / f".{final.name}.part"
    if dist.get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(optimizer.master_state() | optimizer.momentum_state(), str(part))
    if dist.get_rank() == 0:
        files = sorted(path for path in part.iterdir())
        content = {
            "state": dataclasses.asdict(state),
            "recipe": dataclasses.asdict(run),
            "files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files},
        }
        write_json(part / STATE_FILE, content)
        for file in files:
            fsync(file)
        fsync(part)
        if final.exists():  # complete, but `latest` never came to name it
            shutil.rmtree(final)
        part.rename(final)
        fsync(checkpoints)
        write_text(checkpoints / LATEST_FILE, final.name + "\n")
        _remove_old(checkpoints, run.train.keep_checkpoints)
    dist.barrier()
    return final


def _remove_old(checkpoints: Path, keep: int) -> None:
    complete = sorted(checkpoints.glob("step-*"))
    for folder in complete[:-keep] if keep else []:
        shutil.rmtree(folder)
    for folder in checkpoints.glob(".step-*.part"):
        shutil.rmtree(folder)


def load(folder: Path, run: Run, optimizer: ReplicatedOptimizer) -> TrainState:
    """Fill the optimizer's masters and momenta and the model from a checkpoint that any layout wrote."""
    content = read_state(folder)
    check_model(folder, content, run)
    check_pickles(folder)
    wanted = optimizer.master_state() | optimizer.momentum_state()
    own = {key: sharded.data for key, sharded in wanted.items()}
    loaded = dist_checkpointing.load(wanted, str(folder))
    for key, tensor in own.items():
        tensor.detach().copy_(loaded[key])
    optimizer.copy_masters_to_model()
    return TrainState(**content["state"])
