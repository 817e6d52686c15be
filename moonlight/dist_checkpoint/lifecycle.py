"""Complete, load and remove training checkpoints.

A checkpoint holds global tensors under their own names and does not depend on the layout that wrote it: float32 master
weights under the names of `hf_mapping`, momenta under `optimizer.<momentum>.<name>`. All ranks write it, and it appears
atomically. `async_save` writes to disk, `state` defines the files, `tensors` their contents,
and `recovery` chooses the checkpoint that a run resumes from.
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
    """Where a checkpoint lies while it is written."""
    return final.with_name(f".{final.name}.part")


def commit_checkpoint(part: Path, final: Path, content: dict[str, Any]) -> None:
    """Complete the checkpoint in `part` with its `state.json`, give it its name, and let `latest` point to it."""
    write_state(part, content)
    fsync(part)
    with _replaced(final):
        part.rename(final)
        try:
            fsync(final.parent)
            atomic_write_text(final.parent / LATEST_FILE, final.name + "\n")
        except BaseException:
            final.rename(part)  # there for whoever cleans up
            raise


def apply_retention(newest: Path, train_config: TrainConfig) -> None:
    """Remove the checkpoints before `newest`, which was just completed, but for those that the recipe keeps.

    Those are `keep_checkpoints` with `newest` among them (0: all), those after multiples of `keep_every_steps`, and, if
    spikes lead to rollbacks, the one that a spike in the next step would need.
    """
    steps = [checkpoint_step(folder) for folder in complete_checkpoints(newest.parent) if folder <= newest]
    every, back = train_config.keep_every_steps, checkpoint_step(newest) + 1 - train_config.rollback_steps
    kept = set(steps[-train_config.keep_checkpoints :]) | {step for step in steps if every and step % every == 0}
    if train_config.spike_policy == "rollback":
        kept |= {max((step for step in steps if step <= back), default=0)}
    for step in steps:
        if step not in kept:
            _remove(step_folder(newest.parent, step))


def remove_partial(checkpoints: Path) -> None:
    """Remove what killed processes and failed saves left unfinished."""
    for folder in checkpoints.glob(".step-*.part"):
        shutil.rmtree(folder, ignore_errors=True)


def delete_later(folder: Path) -> None:
    """Make `folder` the newest checkpoint of all, by removing those of later steps. By all ranks."""
    dist.barrier()  # nobody reads one of them any more
    if dist.get_rank() == 0:
        atomic_write_text(folder.parent / LATEST_FILE, folder.name + "\n")
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


def load_checkpoint(folder: Path, config: RunConfig, optimizer: CheckpointedOptimizer) -> TrainState:
    """Fill the optimizer's masters and momenta and the model from a checkpoint that any layout wrote.

    It must have been checked (`recovery`).
    """
    content = read_state(folder, check_files=False)
    check_model(folder, content, config)
    check_optimizer(folder, content, config)
    with optimizer.loading_masters() as masters:
        load_tensors(folder, masters | optimizer.optimizer_state_dict())
    return TrainState.from_json(content["state"])


def load_weights(folder: Path, config: RunConfig, optimizer: CheckpointedOptimizer) -> None:
    """Fill the masters and the model alone from a checkpoint that has been checked; momenta stay zero."""
    check_model(folder, read_state(folder, check_files=False), config)
    with optimizer.loading_masters() as masters:
        load_tensors(folder, masters, strict=False)
