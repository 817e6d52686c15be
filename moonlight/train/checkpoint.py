"""Completing and loading checkpoints: whole tensors under their own names, written by all ranks, complete or absent.

Weights are float32 masters under the names of `moonlight.mapping`, momenta under `optimizer.<momentum>.<name>`. Nothing
depends on the layout that wrote it. See `saver` for how they come to the disk, `checkpoint_files` for the files,
`checkpoint_tensors` for what is in them, and `checkpoint_recovery` for which one a run goes on from.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moonlight.config import Run, Train
from moonlight.files import fsync, write_text
from moonlight.optim.sharded import ShardedOptimizer
from moonlight.train.checkpoint_files import (
    LATEST_FILE,
    TrainState,
    check_model,
    check_optimizer,
    complete_checkpoints,
    read_state,
    step_folder,
    step_folders,
    step_of,
    write_state,
)
from moonlight.train.checkpoint_tensors import load_tensors


def part_of(final: Path) -> Path:
    """Where a checkpoint lies while it is written."""
    return final.with_name(f".{final.name}.part")


def publish(part: Path, final: Path, content: dict[str, Any]) -> None:
    """Complete the checkpoint in `part` with its `state.json`, give it its name, and let `latest` point to it."""
    write_state(part, content)
    fsync(part)
    with _replaced(final):
        part.rename(final)
        try:
            fsync(final.parent)
            write_text(final.parent / LATEST_FILE, final.name + "\n")
        except BaseException:
            final.rename(part)  # there for whoever cleans up
            raise


def remove_old(newest: Path, train: Train) -> None:
    """Remove the checkpoints before `newest`, which was just completed, but for those that the recipe keeps.

    Those are `keep_checkpoints` with `newest` among them (0: all), those after multiples of `keep_every_steps`, and, if
    spikes lead to rollbacks, the one that a spike in the next step would need.
    """
    steps = [step_of(folder) for folder in complete_checkpoints(newest.parent) if folder <= newest]
    every, back = train.keep_every_steps, step_of(newest) + 1 - train.rollback_steps
    kept = set(steps[-train.keep_checkpoints :]) | {step for step in steps if every and step % every == 0}
    if train.spike_policy == "rollback":
        kept |= {max((step for step in steps if step <= back), default=0)}
    for step in steps:
        if step not in kept:
            _remove(step_folder(newest.parent, step))


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what killed processes and failed saves left unfinished."""
    for folder in checkpoints.glob(".step-*.part"):
        shutil.rmtree(folder, ignore_errors=True)


def forget_after(folder: Path) -> None:
    """Make `folder` the newest checkpoint of all, by removing those of later steps. By all ranks."""
    dist.barrier()  # nobody reads one of them any more
    if dist.get_rank() == 0:
        write_text(folder.parent / LATEST_FILE, folder.name + "\n")
        for later in step_folders(folder.parent):
            if later > folder:
                _remove(later)
    dist.barrier()


def _remove(folder: Path) -> None:
    """Remove a checkpoint: it is complete, or does not have a checkpoint's name any more."""
    with _replaced(folder):
        pass


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[None]:
    """Take a checkpoint's name away in one step, and remove its files when the block has ended.

    There may be none: only a run that went back comes by one a second time.
    """
    part = folder.with_name(f".{folder.name}.old.part")
    shutil.rmtree(part, ignore_errors=True)
    if folder.exists():
        folder.rename(part)
    try:
        yield
    except BaseException:
        if part.exists():
            part.rename(folder)
        raise
    shutil.rmtree(part, ignore_errors=True)


def load(folder: Path, run: Run, optimizer: ShardedOptimizer) -> TrainState:
    """Fill the optimizer's masters and momenta and the model from a checkpoint that any layout wrote.

    It must have been checked (`checkpoint_recovery`).
    """
    content = read_state(folder, check_files=False)
    check_model(folder, content, run)
    check_optimizer(folder, content, run)
    with optimizer.fill_masters() as masters:
        load_tensors(folder, masters | optimizer.momentum_state())
    return TrainState.from_json(content["state"])


def load_weights(folder: Path, run: Run, optimizer: ShardedOptimizer) -> None:
    """Fill the masters and the model alone from a checkpoint that has been checked; momenta stay zero."""
    check_model(folder, read_state(folder, check_files=False), run)
    with optimizer.fill_masters() as masters:
        load_tensors(folder, masters, all_of_it=False)
