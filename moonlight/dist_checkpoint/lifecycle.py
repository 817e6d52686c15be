"""Complete, load and remove training checkpoints.

A checkpoint holds global tensors under their own names and does not depend on the layout that wrote it: float32 master
weights under the names of `hf_mapping`, momenta under `optimizer.<momentum>.<name>`. All ranks write it, and it appears
atomically. `async_save` writes to disk, `state` defines the files, `tensors` their contents, and `recovery` selects the
checkpoint that a run resumes from.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moonlight.config.run import RunConfig
from moonlight.config.train import TrainConfig
from moonlight.dist_checkpoint.chunks import CheckpointedOptimizer
from moonlight.dist_checkpoint.state import (
    LATEST_FILE,
    TrainState,
    check_model,
    check_optimizer,
    checkpoint_step,
    complete_checkpoints,
    read_state,
    step_folder,
    step_folders,
    write_state,
)
from moonlight.dist_checkpoint.tensors import load_tensors
from moonlight.files import atomic_write_text, fsync


def partial_path(final: Path) -> Path:
    """Return the path of a checkpoint while it is being written."""
    return final.with_name(f".{final.name}.part")


def commit_checkpoint(partial: Path, final: Path, content: dict[str, Any]) -> None:
    """Complete the checkpoint in `partial`: write its `state.json`, rename it to `final`, and point `latest` to it."""
    write_state(partial, content)
    fsync(partial)
    with _replaced(final):
        partial.rename(final)
        try:
            fsync(final.parent)
            atomic_write_text(final.parent / LATEST_FILE, final.name + "\n")
        except BaseException:
            final.rename(partial)  # the caller deletes it
            raise


def apply_retention(newest: Path, train_config: TrainConfig) -> None:
    """Delete the checkpoints before `newest`, which was just completed, except those that the recipe keeps.

    The recipe keeps the last `keep_checkpoints` including `newest` (0: all) and those at multiples of
    `keep_every_steps`. With `spike_policy: rollback` it also keeps the one that a spike in the next step would need.
    """
    steps = [checkpoint_step(folder) for folder in complete_checkpoints(newest.parent) if folder <= newest]
    every, rollback_step = train_config.keep_every_steps, checkpoint_step(newest) + 1 - train_config.rollback_steps
    kept = set(steps[-train_config.keep_checkpoints :]) | {step for step in steps if every and step % every == 0}
    if train_config.spike_policy == "rollback":
        kept |= {max((step for step in steps if step <= rollback_step), default=0)}
    for step in steps:
        if step not in kept:
            _remove(step_folder(newest.parent, step))


def remove_partial(checkpoints: Path) -> None:
    """Delete the partial checkpoints that killed processes and failed saves left."""
    for folder in checkpoints.glob(".step-*.part"):
        shutil.rmtree(folder, ignore_errors=True)


def delete_later(folder: Path) -> None:
    """Make `folder` the newest checkpoint, by deleting later steps. Collective."""
    dist.barrier()  # no rank reads a later one any more
    if dist.get_rank() == 0:
        atomic_write_text(folder.parent / LATEST_FILE, folder.name + "\n")
        for later in step_folders(folder.parent):
            if later > folder:
                _remove(later)
    dist.barrier()


def _remove(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that no folder with a checkpoint's name is incomplete."""
    with _replaced(folder):
        pass


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[None]:
    """Rename a checkpoint out of the way atomically; delete its files when the block ends, restore it if that raises.

    The checkpoint usually does not exist: only a run that rolled back saves the same step a second time.
    """
    old = folder.with_name(f".{folder.name}.old.part")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        yield
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path, config: RunConfig, optimizer: CheckpointedOptimizer) -> TrainState:
    """Fill master weights, momenta and the model from a checkpoint, whatever layout wrote it. Collective.

    `recovery.verify_checkpoint` must have checked it.

    Returns:
        The state to resume from.

    Raises:
        UserError: the checkpoint is of a different model or optimizer, or holds weights only.
    """
    content = read_state(folder, check_files=False)
    check_model(folder, content, config)
    check_optimizer(folder, content, config)
    with optimizer.loading_masters() as masters:
        load_tensors(folder, masters | optimizer.optimizer_state_dict())
    return TrainState.from_json(content["state"])


def load_weights(folder: Path, config: RunConfig, optimizer: CheckpointedOptimizer) -> None:
    """Fill master weights and the model, but not the momenta, from a checkpoint. Collective.

    `recovery.verify_checkpoint` must have checked it.

    Raises:
        UserError: the checkpoint was saved from a different model.
    """
    check_model(folder, read_state(folder, check_files=False), config)
    with optimizer.loading_masters() as masters:
        load_tensors(folder, masters, strict=False)
