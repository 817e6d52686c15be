"""Select the checkpoint that a run resumes from: the one that `latest` names, or the newest valid one of the others.

The ranks share the reading: each checks some of the files, and all ranks get every result. A corrupt checkpoint is
never loaded. When a valid one has been found, corrupt ones are renamed to `damaged-step-...`, so that retention does
not count them. They stay there until a user deletes them. If a user wrote an older checkpoint's name into `latest`, the
later checkpoints are renamed to `later-step-...`.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moonlight.dist_checkpoint.index import StoredTensors
from moonlight.dist_checkpoint.state import (
    LATEST_FILE,
    STATE_FILE,
    CorruptCheckpointError,
    check_file,
    checkpoint_step,
    complete_checkpoints,
    read_latest,
    read_state,
    step_folders,
)
from moonlight.errors import UserError
from moonlight.files import atomic_write_text, fsync

MAX_LISTED_FAULTS = 3
"""Maximum number of corrupt checkpoints in one message."""


def verify_checkpoint(folder: Path) -> None:
    """Check a checkpoint: size and checksum of every file, then the index and the headers of the tensors.

    Collective; all ranks raise the same error.

    Raises:
        CorruptCheckpointError: the checkpoint is incomplete or was altered.
        UserError: its format is newer than this code reads.
    """
    content: dict[str, Any] = {}
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def read_local_state() -> None:
        content.update(read_state(folder, check_files=False))

    def check_local_files() -> None:
        for name in sorted(content["files"])[rank::world_size]:
            check_file(folder, name, content)

    def check_local_tensors() -> None:
        stored = StoredTensors(folder)
        for key in sorted(stored.shapes)[rank::world_size]:
            for offset, sizes in stored.chunks(key).items():
                stored.mmap_chunk(key, offset, sizes)

    for check in (read_local_state, check_local_files, check_local_tensors):
        _on_all_ranks(folder, check)


def _on_all_ranks(folder: Path, check: Callable[[], None]) -> None:
    """Run `check` on each rank; raise the error of the first rank that failed, on all ranks."""
    error: UserError | None = None
    try:
        check()
    except UserError as caught:
        error = caught
    except OSError as caught:
        error = CorruptCheckpointError(f"checkpoint file {caught.filename or folder} cannot be read: {caught.strerror}")
    errors = [error] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if first := next((error for error in errors if error), None):
        raise first


def newest_valid(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to resume from, verified, and warnings if it is not the expected one. Collective.

    Afterwards `latest` names that checkpoint, and the corrupt and later ones have been renamed.

    Returns:
        None and no warnings if the folder never held a checkpoint.

    Raises:
        UserError: no checkpoint in the folder is valid; nothing was changed.
    """
    candidates, skipped, warnings = _from_first_rank(lambda: _candidates(checkpoints))
    corrupt: list[tuple[Path, str]] = []
    for folder in candidates:
        try:
            verify_checkpoint(folder)
        except CorruptCheckpointError as error:
            corrupt.append((folder, str(error)))
            continue
        moves = [(path, "damaged") for path, _ in corrupt] + [(path, "later") for path in skipped]
        faults = [fault for _, fault in corrupt] + [
            f"{path} is newer than the checkpoint that {LATEST_FILE} names" for path in skipped
        ]
        for fault, new_path in zip(faults, _from_first_rank(partial(_quarantine, moves, folder)), strict=True):
            warnings.append(f"warning: {fault}; it was moved to {new_path}: delete it if you do not need it")
        if corrupt or warnings:
            warnings.append(f"warning: resuming from {folder}")
        return folder, warnings
    if not candidates:
        return None, []
    first = "; ".join(fault for _, fault in corrupt[:MAX_LISTED_FAULTS])
    raise UserError(
        f"{checkpoints} holds no valid checkpoint ({len(corrupt)} corrupt: {first}): restore a valid one from a "
        "copy, or give the run another name to start over"
    )


def newest_valid_up_to(checkpoints: Path, step: int) -> Path | None:
    """Return the newest valid checkpoint at or before `step`, or None if none is valid. Collective."""
    for folder in _from_first_rank(lambda: complete_checkpoints(checkpoints)[::-1]):
        if checkpoint_step(folder) <= step:
            with contextlib.suppress(CorruptCheckpointError):
                verify_checkpoint(folder)
                return folder
    return None


def _from_first_rank(function: Callable[[], Any]) -> Any:
    """Call `function` on rank 0; return its result, or raise its error, on all ranks."""
    values: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            values[0] = function()
        except (UserError, OSError) as error:
            values[1] = error
    dist.broadcast_object_list(values)
    if values[1] is not None:
        raise values[1]
    return values[0]


def _candidates(checkpoints: Path) -> tuple[list[Path], list[Path], list[str]]:
    """Return checkpoints in the order to try them, checkpoints to skip, and warnings about `latest`.

    Checkpoints newer than the one that `latest` names are of two kinds. If `latest` was written after them, a user or a
    rollback skipped them on purpose. If they were completed after `latest` was written, the run ended before it could
    update `latest`, and they are tried first.
    """
    folders = step_folders(checkpoints)[::-1]
    pointer = checkpoints / LATEST_FILE
    name, named = read_latest(checkpoints)
    if named is not None:
        newer = [folder for folder in folders if folder > named and (folder / STATE_FILE).is_file()]
        written = pointer.stat().st_mtime_ns
        skipped = [folder for folder in newer if (folder / STATE_FILE).stat().st_mtime_ns <= written]
        completed = [folder for folder in newer if folder not in skipped]
        candidates = [*completed, named, *(folder for folder in folders if folder < named)]
        return candidates, skipped, [f"warning: {pointer} does not name {f.name} yet" for f in completed[:1]]
    if not folders:
        if pointer.exists():
            raise UserError(f"{pointer} names {name!r}, but {checkpoints} holds no checkpoint: delete {LATEST_FILE}")
        return [], [], []
    if not pointer.exists():
        return folders, [], [f"warning: {pointer} is missing"]
    # If `latest` names an incomplete checkpoint, verify_checkpoint reports what is missing.
    is_incomplete = name in {folder.name for folder in folders}
    return folders, [], [] if is_incomplete else [f"warning: {pointer} names no checkpoint ({name!r})"]


def _quarantine(moves: list[tuple[Path, str]], chosen: Path) -> list[Path]:
    """Point `latest` to `chosen`, then rename the other checkpoints; return their new paths.

    Args:
        moves: (folder, prefix) of each checkpoint to rename. With the prefix it no longer has a checkpoint's name.
    """
    if read_latest(chosen.parent)[1] != chosen:
        atomic_write_text(chosen.parent / LATEST_FILE, chosen.name + "\n")
    new_paths = []
    for folder, prefix in moves:
        number, new_path = 1, folder.with_name(f"{prefix}-{folder.name}")
        while new_path.exists():
            number += 1
            new_path = folder.with_name(f"{prefix}-{folder.name}-{number}")
        folder.rename(new_path)
        new_paths.append(new_path)
    if moves:
        fsync(chosen.parent)
    return new_paths
