"""Saving and loading checkpoints: whole tensors under their own names, written by all ranks, complete or absent.

Weights are float32 masters under the names of `moonlight.mapping`, momenta under `optimizer.<momentum>.<name>`. Nothing
depends on the layout that wrote it. See `checkpoint_files` for the files, `checkpoint_tensors` for what is in them.
"""

import contextlib
import dataclasses
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moonlight.config import Run
from moonlight.errors import UserError, naming
from moonlight.files import checksum_of, fsync, write_json, write_text
from moonlight.optim.sharded import ShardedOptimizer
from moonlight.train.checkpoint_files import (
    LATEST_FILE,
    STATE_FILE,
    TrainState,
    check_model,
    check_optimizer,
    complete_checkpoints,
    read_state,
    step_folder,
)
from moonlight.train.checkpoint_tensors import load_tensors, save_tensors


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
        save_tensors(part, optimizer.master_state() | optimizer.momentum_state())
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
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"checkpoint {final} could not be written ({error.strerror}): {free} bytes are free on its disk; free "
                "some space, or raise the limit that `ulimit -f` shows, and start again"
            ) from error
        raise


def _publish(part: Path, final: Path, content: dict[str, Any]) -> None:
    """Complete the checkpoint in `part` with its `state.json`, give it its name, and let `latest` point to it."""
    files = sorted(part.iterdir())
    content["files"] = {file.name: {"bytes": file.stat().st_size, "xxh3": checksum_of(file)} for file in files}
    write_json(part / STATE_FILE, content)
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


def forget_after(checkpoints: Path, folder: Path) -> None:
    """Make `folder` the newest checkpoint of all, by removing those of later steps. By all ranks."""
    dist.barrier()  # nobody reads one of them any more
    if dist.get_rank() == 0:
        write_text(checkpoints / LATEST_FILE, folder.name + "\n")
        for later in complete_checkpoints(checkpoints):
            if later.name > folder.name:
                shutil.rmtree(later)
    dist.barrier()


def load(folder: Path, run: Run, optimizer: ShardedOptimizer) -> TrainState:
    """Fill the optimizer's masters and momenta and the model from a checkpoint that any layout wrote."""
    content = read_state(folder)
    check_model(folder, content, run)
    check_optimizer(folder, content, run)
    with optimizer.fill_masters() as masters:
        load_tensors(folder, masters | optimizer.momentum_state())
    return TrainState.from_json(content["state"])


def load_weights(folder: Path, run: Run, optimizer: ShardedOptimizer) -> None:
    """Fill the masters and the model alone, for a run that starts from a checkpoint; momenta stay zero.

    Its files must have been checked (`run_folder.check_initial_checkpoint`).
    """
    check_model(folder, read_state(folder, check_files=False), run)
    with optimizer.fill_masters() as masters:
        load_tensors(folder, masters, all_of_it=False)
