"""Checkpoints: whole tensors under their own names, written by all ranks, complete or absent.

    runs/<name>/checkpoints/step-00000100/   Megatron's distributed checkpoint and state.json
    runs/<name>/checkpoints/latest           the name of the newest complete one

Weights are float32 masters under the names of `moonlight.mapping`, momenta under `optimizer.<momentum>.<name>`. Nothing
depends on the layout that wrote it. `state.json` holds what is not a tensor, and the size and checksum of every file.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

import moonlight.cpu  # noqa: F401  (stand-ins, before Megatron)
from megatron.core import dist_checkpointing
from moonlight.config import Run
from moonlight.errors import UserError
from moonlight.files import fsync, sha256_of, write_json, write_text
from moonlight.optim.replicated import ReplicatedOptimizer

STATE_FILE = "state.json"
LATEST_FILE = "latest"


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands. With the checkpoint's tensors, all that its continuation depends on."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    consumed_sequences: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0


def step_folder(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint after `step`."""
    return checkpoints / f"step-{step:08d}"


def latest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint, or None if there is none yet."""
    pointer = checkpoints / LATEST_FILE
    return checkpoints / pointer.read_text(encoding="utf-8").strip() if pointer.exists() else None


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
            "model": dataclasses.asdict(run.model),
            "optimizer": run.optimizer.name,
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


def read_state(folder: Path, model: Any = None, optimizer_name: str | None = None) -> dict[str, Any]:
    """`state.json` of a checkpoint, after checking that its files are whole and that it belongs to the recipe.

    Args:
        model: `moonlight.config.Model` it must hold; None for any.
        optimizer_name: optimizer whose momenta it must hold; None for any.

    Raises:
        UserError: missing, incomplete, truncated or altered files; another model or optimizer.
    """
    path = folder / STATE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = content["files"]
    except OSError:
        raise UserError(f"checkpoint {folder} has no {STATE_FILE}: it is not a complete checkpoint") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"checkpoint file {path} is damaged: it does not hold what was written") from None
    for name, known in files.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"checkpoint {folder} is incomplete: {name} is missing")
        if file.stat().st_size != known["bytes"]:
            size = file.stat().st_size
            raise UserError(f"checkpoint file {file} has {size} bytes instead of {known['bytes']}: it is truncated")
        if sha256_of(file) != known["sha256"]:
            raise UserError(f"checkpoint file {file} does not match its checksum: it is damaged")
    if model is not None and content["model"] != dataclasses.asdict(model):
        differences = [
            f"{key} {content['model'].get(key)!r} there, {value!r} here"
            for key, value in dataclasses.asdict(model).items()
            if content["model"].get(key) != value
        ]
        raise UserError(f"checkpoint {folder} is of another model: {'; '.join(differences)}")
    if optimizer_name is not None and content["optimizer"] != optimizer_name:
        raise UserError(
            f"checkpoint {folder} holds the state of {content['optimizer']}, the recipe wants {optimizer_name}"
        )
    return content


def load(folder: Path, run: Run, optimizer: ReplicatedOptimizer) -> TrainState:
    """Fill the optimizer's masters and momenta and the model from a checkpoint that any layout wrote."""
    content = read_state(folder, run.model, run.optimizer.name)
    wanted = optimizer.master_state() | optimizer.momentum_state()
    own = {key: sharded.data for key, sharded in wanted.items()}
    loaded = dist_checkpointing.load(wanted, str(folder))
    for key, tensor in own.items():
        tensor.detach().copy_(loaded[key])
    optimizer.copy_masters_to_model()
    return TrainState(**content["state"])
