"""Saving and loading checkpoints: whole tensors under their own names, written by all ranks, complete or absent.

Weights are float32 masters under the names of `moonlight.mapping`, momenta under `optimizer.<momentum>.<name>`. Nothing
depends on the layout that wrote it. See `checkpoint_files` for the files.
"""

import contextlib
import dataclasses
import queue
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import moonlight.cpu  # noqa: F401  (stand-ins, before Megatron)

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.api import CheckpointException

from moonlight.config import Run
from moonlight.errors import UserError, naming
from moonlight.files import fsync, sha256_of, write_json, write_text
from moonlight.optim.sharded import ShardedOptimizer
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


def save(checkpoints: Path, run: Run, optimizer: ShardedOptimizer, state: TrainState, tokenizer_sha256: str) -> Path:
    """Write a checkpoint by all ranks; `latest` moves only once it is on the disk. Old ones are removed after that.

    Args:
        tokenizer_sha256: checksum of the tokenizer that made the run's tokens, for whoever exports the model.
    """
    final = step_folder(checkpoints, state.step)
    part = checkpoints / f".{final.name}.part"
    if dist.get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    with _nothing_half_written(part, final):
        dist_checkpointing.save(optimizer.master_state() | optimizer.momentum_state(), str(part))
        if dist.get_rank() == 0:
            content = {
                "state": dataclasses.asdict(state),
                "recipe": dataclasses.asdict(run),
                "tokenizer_sha256": tokenizer_sha256,
            }
            _publish(part, final, content)
            _remove_old(checkpoints, run.train.keep_checkpoints)
    dist.barrier()
    return final


@contextlib.contextmanager
def _nothing_half_written(part: Path, final: Path) -> Iterator[None]:
    """Remove `part` when writing fails, and say so in one line if the disk would not take it."""
    try:
        with naming(final):
            yield
    except BaseException as error:
        free = shutil.disk_usage(part.parent).free
        if dist.get_rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        # Only the first rank knows which rank failed, and why; the others raise without a reason.
        if isinstance(error, CheckpointException) and error.failures:
            reason, _ = next(iter(error.failures.values()))
            raise UserError(
                f"checkpoint {final} could not be written ({reason}): {free} bytes are free on its disk; free some "
                "space, or raise the limit that `ulimit -f` shows, and start again"
            ) from error
        raise


def _publish(part: Path, final: Path, content: dict[str, Any]) -> None:
    """Complete the checkpoint in `part` with its `state.json`, give it its name, and let `latest` point to it."""
    files = sorted(part.iterdir())
    content["files"] = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files}
    write_json(part / STATE_FILE, content)
    for file in files:
        fsync(file)
    fsync(part)
    if final.exists():  # complete, but `latest` never came to name it
        shutil.rmtree(final)
    part.rename(final)
    fsync(final.parent)
    write_text(final.parent / LATEST_FILE, final.name + "\n")


def _remove_old(checkpoints: Path, keep: int) -> None:
    complete = sorted(checkpoints.glob("step-*"))
    for folder in complete[:-keep] if keep else []:
        shutil.rmtree(folder)
    for folder in checkpoints.glob(".step-*.part"):
        shutil.rmtree(folder)


def load(folder: Path, run: Run, optimizer: ShardedOptimizer) -> TrainState:
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
