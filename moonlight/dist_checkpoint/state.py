"""Checkpoints on disk, as far as they can be understood without torch: where they are, what they are of, whether whole.

    runs/<name>/checkpoints/step-00000100/   torch's distributed checkpoint and state.json
    runs/<name>/checkpoints/latest           the name of the newest complete one

`state.json` holds what is not a tensor (where the run stands, its recipe), the size and checksum of every file, and a
checksum of itself.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from moonlight.config.load import parse_model_config, parse_run_config
from moonlight.config.model import ModelConfig
from moonlight.config.run import RunConfig
from moonlight.errors import UserError
from moonlight.files import atomic_write_text, xxh3_checksum

STATE_FILE = "state.json"
LATEST_FILE = "latest"
STEP_NAME = r"step-\d{8}"
FORMAT = 2
"""Of what is written. 1 had neither this number nor a checksum of `state.json` itself; it is still read.

A later format keeps number and checksum where they are, so that a newer checkpoint can be told from a damaged one.
"""
CHECKSUM = "xxh3"
NO_CHECKSUM = "0" * 32
OF_FORMAT_1 = {"state", "recipe", "tokenizer_sha256", "files", "origin"}


class CorruptCheckpointError(UserError):
    """A checkpoint is not what was written; an older one may be."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands. With the checkpoint's tensors, all that its continuation depends on."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    consumed_sequences: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    """Steps skipped since the last one that was not."""
    passed_over_sequences: int = 0
    """Training sequences that rollbacks passed over: sequence n of the schedule is number n + this of the data."""
    rollbacks_in_a_row: int = 0
    """Rollbacks since the run last got past a spike."""
    last_spike_step: int = 0
    """Step of the spike that the last rollback went back from."""
    recent_losses: tuple[float, ...] = ()
    """Losses of the last steps that were not skipped, the newest last, at most `train.spike_window` of them."""

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "TrainState":
        """From what `dataclasses.asdict` gave, by way of JSON.

        Raises:
            ValueError, TypeError, KeyError: it did not give this.
        """
        losses = content.get("recent_losses", [])
        state = cls(**content | {"recent_losses": tuple(losses)})
        numbers = [value for name, value in dataclasses.asdict(state).items() if name != "recent_losses"]
        if not all(type(value) is int and value >= 0 for value in numbers) or type(losses) is not list:
            raise ValueError(content)
        if not all(type(loss) is float and math.isfinite(loss) for loss in losses):
            raise ValueError(losses)
        return state


def step_folder(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint after `step`."""
    return checkpoints / f"step-{step:08d}"


def checkpoint_step(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step-"))


def step_folders(checkpoints: Path) -> list[Path]:
    """The folders with names of checkpoints, complete or not, from the oldest on."""
    return sorted(folder for folder in checkpoints.glob("step-*") if re.fullmatch(STEP_NAME, folder.name))


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint, or None if there is none yet.

    Raises:
        UserError: `latest` is there and names none.
    """
    pointer = checkpoints / LATEST_FILE
    if not pointer.exists():
        return None
    name, folder = read_latest(checkpoints)
    if folder is None:
        there = ", ".join(place.name for place in complete_checkpoints(checkpoints)) or "none"
        raise UserError(f"{pointer} names no checkpoint ({name!r}): write the name of one into it; there are {there}")
    return folder


def read_latest(checkpoints: Path) -> tuple[str, Path | None]:
    """What `latest` says, and the checkpoint that it names; None if there is none of this name."""
    try:
        name = (checkpoints / LATEST_FILE).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        name = ""
    there = re.fullmatch(STEP_NAME, name) and (checkpoints / name / STATE_FILE).is_file()
    return name, checkpoints / name if there else None


def write_state(folder: Path, content: dict[str, Any]) -> None:
    """Write `state.json`, which completes the checkpoint in `folder`.

    Args:
        content: all but its format and its own checksum. See `read_state`.
    """
    text = json.dumps({"format": FORMAT, CHECKSUM: NO_CHECKSUM, **content}, indent=2, ensure_ascii=False) + "\n"
    atomic_write_text(folder / STATE_FILE, text.replace(NO_CHECKSUM, _checksum(text), 1))


def _checksum(text: str) -> str:
    """XXH3 of a `state.json` in which zeros stand for it."""
    return xxhash.xxh3_128(text.encode()).hexdigest()


def read_state(folder: Path, *, check_files: bool = True) -> dict[str, Any]:
    """`state.json` of a checkpoint, after checking that every file is whole.

    Args:
        check_files: False looks at nothing but `state.json` itself.

    Raises:
        CorruptCheckpointError: missing, incomplete, truncated or altered files.
        UserError: it is of a format that is newer than this code.
    """
    path = folder / STATE_FILE
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        sound = _is_sealed(content, text) and _has_form(content)
    except OSError:
        raise CorruptCheckpointError(
            f"checkpoint {folder} has no {STATE_FILE}: it is not a complete checkpoint"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise CorruptCheckpointError(f"checkpoint file {path} is damaged: it does not hold what was written")
    if content.get("format", 1) > FORMAT:
        raise UserError(
            f"checkpoint {folder} has format {content['format']}, this version of the software reads formats up to "
            f"{FORMAT}: use the version that wrote it, or a newer one"
        )
    try:
        stored_config(content)
    except UserError as error:
        raise CorruptCheckpointError(f"the recipe in checkpoint file {path} cannot be used: {error}") from None
    for name in content["files"] if check_files else ():
        check_file(folder, name, content)
    return content


def _is_sealed(content: dict[str, Any], text: str) -> bool:
    """Whether `text` matches the checksum in it. The first format had none, and nothing but its four or five keys."""
    if content.keys() <= OF_FORMAT_1:
        return True
    seal = content[CHECKSUM]
    return type(content["format"]) is int and _checksum(text.replace(seal, NO_CHECKSUM, 1)) == seal


def _has_form(content: dict[str, Any]) -> bool:
    if content.get("format", 1) > FORMAT:
        return True  # not ours to judge
    TrainState.from_json(content["state"])
    files = content["files"]
    return (
        all({"bytes", "xxh3"} <= known.keys() for known in files.values())
        and ".metadata" in files
        and type(content["recipe"]) is dict
        and type(content["tokenizer_sha256"]) is str
    )


def check_file(
    folder: Path, name: str, content: dict[str, Any], checksum: Callable[[Path], str] = xxh3_checksum
) -> None:
    """Compare size and checksum (XXH3) of one file with what `state.json` says.

    Raises:
        CorruptCheckpointError: they differ, or it is missing.
    """
    file, known = folder / name, content["files"][name]
    if not file.is_file():
        raise CorruptCheckpointError(f"checkpoint {folder} is incomplete: {name} is missing")
    found = {"bytes": file.stat().st_size, "xxh3": checksum(file)}
    if all(found[key] == known[key] for key in found):
        return
    if other := next((other for other, its in content["files"].items() if its == found), None):
        raise CorruptCheckpointError(f"checkpoint file {file} holds what belongs into {other}: files were swapped")
    if found["bytes"] != known["bytes"]:
        raise CorruptCheckpointError(
            f"checkpoint file {file} has {found['bytes']} bytes instead of {known['bytes']}: it is truncated or damaged"
        )
    raise CorruptCheckpointError(f"checkpoint file {file} does not match its checksum: it is damaged")


def stored_config(content: dict[str, Any]) -> tuple[ModelConfig, RunConfig | None]:
    """What `state.json` says the checkpoint is of: the model, and the recipe that trained it unless it was imported.

    Raises:
        UserError: they are no valid settings.
    """
    recipe = content["recipe"]
    if recipe.keys() == {"model"}:
        return parse_model_config(recipe["model"]), None
    config = parse_run_config(recipe)
    return config.model, config


def check_model(folder: Path, content: dict[str, Any], config: RunConfig) -> None:
    """Raise UserError unless the checkpoint `folder`, whose `state.json` is `content`, is of the model of `run`."""
    # Through `stored_config`, so that a setting added since the checkpoint was written has its default.
    there, here = dataclasses.asdict(stored_config(content)[0]), dataclasses.asdict(config.model)
    differences = [f"{key} {there[key]!r} there, {value!r} here" for key, value in here.items() if there[key] != value]
    if differences:
        raise UserError(f"checkpoint {folder} is of another model: {'; '.join(differences)}")


def check_optimizer(folder: Path, content: dict[str, Any], config: RunConfig) -> None:
    """Raise UserError unless the checkpoint has the optimizer state that `run` would go on with."""
    if content.get("origin"):
        raise UserError(f"checkpoint {folder} holds weights only: name it as train.initial_checkpoint of a new run")
    optimizer = content["recipe"]["optimizer"]["name"]
    if optimizer != config.optimizer.name:
        raise UserError(f"checkpoint {folder} holds the state of {optimizer}, the recipe wants {config.optimizer.name}")


def complete_checkpoints(path: Path) -> list[Path]:
    """The complete checkpoints of a run folder, or of its checkpoints folder, from the oldest on."""
    folders = [folder for place in (path, path / "checkpoints") for folder in step_folders(place)]
    return [folder for folder in folders if (folder / STATE_FILE).is_file()]


def resolve_checkpoint(path: Path, step: int | None = None) -> Path:
    """The checkpoint that `path` means: itself, or one of a run folder or of its checkpoints folder.

    Args:
        step: the one after this step; None takes the newest.

    Raises:
        UserError: there is none.
    """
    if re.fullmatch(r"\..+\.part", path.resolve().name):
        raise UserError(f"{path} is still being written, or was left by a process that was killed: give another")
    if step is not None:
        there = {checkpoint_step(folder): folder for folder in complete_checkpoints(path)}
        if step not in there:
            steps = ", ".join(map(str, there)) or "none"
            raise UserError(f"{path} holds no checkpoint after step {step}: those it holds are after steps {steps}")
        return there[step]
    if (path / STATE_FILE).exists():
        return path
    for folder in (path, path / "checkpoints"):
        if newest := latest_checkpoint(folder):
            return newest
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run folder, or a checkpoint such as .../step-00000100")
    if (path / "config.json").is_file():
        raise UserError(f"{path} is a Hugging Face folder: a run folder or a checkpoint is expected in its place")
    raise UserError(f"{path} holds no checkpoint: give a run folder, or a checkpoint such as .../step-00000100")
