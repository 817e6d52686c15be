"""Find and check checkpoints on disk, without torch: folders, `state.json`, sizes and checksums.

    runs/<name>/checkpoints/step-00000100/   torch's distributed checkpoint and state.json
    runs/<name>/checkpoints/latest           the name of the newest complete checkpoint

`state.json` holds everything that is not a tensor (train state, recipe), the size and checksum of every file, and a
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
"""Format that is written. Format 1, which is still read, had neither this number nor a checksum of `state.json`.

A later format must keep the keys of number and checksum, so that a newer checkpoint differs from a corrupt one.
"""
CHECKSUM = "xxh3"
NO_CHECKSUM = "0" * 32
"""Placeholder for the checksum of `state.json` while that checksum is computed."""
FORMAT_1_KEYS = {"state", "recipe", "tokenizer_sha256", "files", "origin"}


class CorruptCheckpointError(UserError):
    """A checkpoint is incomplete or was altered; an older one may still be valid."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Train state: with the checkpoint's tensors, everything that a resumed run depends on."""

    step: int = 0
    """Completed optimizer steps, including skipped ones."""
    consumed_sequences: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    """Steps skipped since the last step that was not skipped."""
    passed_over_sequences: int = 0
    """Training sequences that rollbacks skipped: sequence n of the schedule is sequence n + this of the data."""
    rollbacks_in_a_row: int = 0
    """Rollbacks since the run last passed a spike."""
    last_spike_step: int = 0
    """Step of the spike that caused the last rollback."""
    recent_losses: tuple[float, ...] = ()
    """Losses of the last steps that were not skipped, newest last; at most `train.spike_window`."""

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "TrainState":
        """Build the state from `dataclasses.asdict` of a state, read back from JSON.

        Raises:
            ValueError, TypeError, KeyError: `content` is not such a dict.
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
    """Return the folder of the checkpoint after `step`."""
    return checkpoints / f"step-{step:08d}"


def checkpoint_step(folder: Path) -> int:
    """Return the step in the name of a checkpoint folder."""
    return int(folder.name.removeprefix("step-"))


def step_folders(checkpoints: Path) -> list[Path]:
    """Return the folders with the name of a checkpoint, complete or not, oldest first."""
    return sorted(folder for folder in checkpoints.glob("step-*") if re.fullmatch(STEP_NAME, folder.name))


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """Return the checkpoint that `latest` names, or None if `latest` does not exist.

    Raises:
        UserError: `latest` exists but names no complete checkpoint.
    """
    pointer = checkpoints / LATEST_FILE
    if not pointer.exists():
        return None
    name, folder = read_latest(checkpoints)
    if folder is None:
        available = ", ".join(path.name for path in complete_checkpoints(checkpoints)) or "none"
        raise UserError(f"{pointer} names no checkpoint ({name!r}): write one of these into it: {available}")
    return folder


def read_latest(checkpoints: Path) -> tuple[str, Path | None]:
    """Return the name in `latest`, and the complete checkpoint of that name or None."""
    try:
        name = (checkpoints / LATEST_FILE).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        name = ""
    is_complete = re.fullmatch(STEP_NAME, name) and (checkpoints / name / STATE_FILE).is_file()
    return name, checkpoints / name if is_complete else None


def write_state(folder: Path, content: dict[str, Any]) -> None:
    """Write `state.json`, which completes the checkpoint in `folder`.

    Args:
        content: everything except the format and the checksum of `state.json`: the keys state, recipe,
            tokenizer_sha256 and files, and for an import origin.
    """
    text = json.dumps({"format": FORMAT, CHECKSUM: NO_CHECKSUM, **content}, indent=2, ensure_ascii=False) + "\n"
    atomic_write_text(folder / STATE_FILE, text.replace(NO_CHECKSUM, _checksum(text), 1))


def _checksum(text: str) -> str:
    """Return the XXH3 checksum of a `state.json` that holds `NO_CHECKSUM` as its checksum."""
    return xxhash.xxh3_128(text.encode()).hexdigest()


def read_state(folder: Path, *, check_files: bool = True) -> dict[str, Any]:
    """Return the content of a checkpoint's `state.json`, after checking every file.

    Args:
        check_files: False checks only `state.json` itself.

    Raises:
        CorruptCheckpointError: a file is missing, truncated or altered.
        UserError: the format is newer than this code reads.
    """
    path = folder / STATE_FILE
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        is_valid = _matches_checksum(content, text) and _has_valid_fields(content)
    except OSError:
        raise CorruptCheckpointError(
            f"checkpoint {folder} has no {STATE_FILE}: it is not a complete checkpoint"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_valid = False
    if not is_valid:
        raise CorruptCheckpointError(f"checkpoint file {path} is corrupt: invalid content or checksum")
    if content.get("format", 1) > FORMAT:
        raise UserError(
            f"checkpoint {folder} has format {content['format']}: this version of the software reads formats up to "
            f"{FORMAT}; use the version that wrote it, or a newer one"
        )
    try:
        stored_config(content)
    except UserError as error:
        raise CorruptCheckpointError(f"the recipe in checkpoint file {path} cannot be used: {error}") from None
    for name in content["files"] if check_files else ():
        check_file(folder, name, content)
    return content


def _matches_checksum(content: dict[str, Any], text: str) -> bool:
    """Return True if `text` matches the checksum in it. Format 1 has no checksum, and only the keys FORMAT_1_KEYS."""
    if content.keys() <= FORMAT_1_KEYS:
        return True
    expected = content[CHECKSUM]
    return type(content["format"]) is int and _checksum(text.replace(expected, NO_CHECKSUM, 1)) == expected


def _has_valid_fields(content: dict[str, Any]) -> bool:
    if content.get("format", 1) > FORMAT:
        return True  # the fields of a newer format are unknown
    TrainState.from_json(content["state"])
    files = content["files"]
    return (
        all({"bytes", "xxh3"} <= file.keys() for file in files.values())
        and ".metadata" in files
        and type(content["recipe"]) is dict
        and type(content["tokenizer_sha256"]) is str
    )


def check_file(
    folder: Path, name: str, content: dict[str, Any], checksum: Callable[[Path], str] = xxh3_checksum
) -> None:
    """Compare size and checksum (XXH3) of one file with those in `state.json`.

    Args:
        content: content of `state.json`.

    Raises:
        CorruptCheckpointError: size or checksum differs, or the file is missing.
    """
    file, expected = folder / name, content["files"][name]
    if not file.is_file():
        raise CorruptCheckpointError(f"checkpoint {folder} is incomplete: {name} is missing")
    actual = {"bytes": file.stat().st_size, "xxh3": checksum(file)}
    if all(actual[key] == expected[key] for key in actual):
        return
    if other := next((other for other, entry in content["files"].items() if entry == actual), None):
        raise CorruptCheckpointError(f"checkpoint file {file} holds the content of {other}: files were swapped")
    if actual["bytes"] != expected["bytes"]:
        raise CorruptCheckpointError(
            f"checkpoint file {file} has {actual['bytes']} bytes instead of {expected['bytes']}: it is truncated or "
            "corrupt"
        )
    raise CorruptCheckpointError(f"checkpoint file {file} does not match its checksum: it is corrupt")


def stored_config(content: dict[str, Any]) -> tuple[ModelConfig, RunConfig | None]:
    """Return the model of a checkpoint, and the config of the run that trained it (None if it was imported).

    Args:
        content: content of `state.json`.

    Raises:
        UserError: the stored settings are invalid.
    """
    recipe = content["recipe"]
    if recipe.keys() == {"model"}:
        return parse_model_config(recipe["model"]), None
    config = parse_run_config(recipe)
    return config.model, config


def check_model(folder: Path, content: dict[str, Any], config: RunConfig) -> None:
    """Raise UserError unless the checkpoint in `folder` was saved from the model of `config`.

    Args:
        content: content of the checkpoint's `state.json`.
    """
    # stored_config gives a setting that was added after the checkpoint was written its default.
    stored, current = dataclasses.asdict(stored_config(content)[0]), dataclasses.asdict(config.model)
    differences = [
        f"{key} {stored[key]!r} there, {value!r} here" for key, value in current.items() if stored[key] != value
    ]
    if differences:
        raise UserError(f"checkpoint {folder} was saved from a different model: {'; '.join(differences)}")


def check_optimizer(folder: Path, content: dict[str, Any], config: RunConfig) -> None:
    """Raise UserError unless the checkpoint in `folder` has the state of the optimizer of `config`."""
    if content.get("origin"):
        raise UserError(f"checkpoint {folder} holds weights only: set train.initial_checkpoint of a new run to it")
    optimizer = content["recipe"]["optimizer"]["name"]
    if optimizer != config.optimizer.name:
        raise UserError(f"checkpoint {folder} holds the state of {optimizer}; the recipe has {config.optimizer.name}")


def complete_checkpoints(path: Path) -> list[Path]:
    """Return the complete checkpoints of a run folder, or of its checkpoints folder, oldest first."""
    folders = [folder for parent in (path, path / "checkpoints") for folder in step_folders(parent)]
    return [folder for folder in folders if (folder / STATE_FILE).is_file()]


def resolve_checkpoint(path: Path, step: int | None = None) -> Path:
    """Return the checkpoint at `path`, which is a checkpoint, a run folder or its checkpoints folder.

    Args:
        step: select the checkpoint after this step; None selects the newest.

    Raises:
        UserError: no such checkpoint exists.
    """
    if re.fullmatch(r"\..+\.part", path.resolve().name):
        raise UserError(f"{path} is partial: it is still being written, or a killed process left it; give another")
    if step is not None:
        by_step = {checkpoint_step(folder): folder for folder in complete_checkpoints(path)}
        if step not in by_step:
            steps = ", ".join(map(str, by_step)) or "none"
            raise UserError(f"{path} holds no checkpoint after step {step}: it has steps {steps}")
        return by_step[step]
    if (path / STATE_FILE).exists():
        return path
    for folder in (path, path / "checkpoints"):
        if newest := latest_checkpoint(folder):
            return newest
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run folder, or a checkpoint such as .../step-00000100")
    if (path / "config.json").is_file():
        raise UserError(f"{path} is a Hugging Face folder: give a run folder or a checkpoint")
    raise UserError(f"{path} holds no checkpoint: give a run folder, or a checkpoint such as .../step-00000100")
