"""Which checkpoint a run goes on from: the one that `latest` names, or the newest of the others that is sound.

Ranks share the reading: each checks some of the files, and all come to know what any has found. A checkpoint that is
not sound is never loaded, and is moved out of the way once a sound one has been found, so that retention does not count
it: to `damaged-step-...`, where it stays until somebody removes it. So are those later than the one that somebody wrote
into `latest`, to `later-step-...`.
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

MAX_NAMED = 3
"""Damaged checkpoints in one message."""


def verify_checkpoint(folder: Path) -> None:
    """Check a checkpoint: every file's size and checksum first, then what index and tensors' headers say.

    All ranks call it, and all raise the same.

    Raises:
        CorruptCheckpointError: it is not what was written.
        UserError: it is of a newer format than this code reads.
    """
    content: dict[str, Any] = {}
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def read_own_state() -> None:
        content.update(read_state(folder, check_files=False))

    def check_own_files() -> None:
        for name in sorted(content["files"])[rank::world_size]:
            check_file(folder, name, content)

    def check_own_tensors() -> None:
        stored = StoredTensors(folder)
        for key in sorted(stored.shapes)[rank::world_size]:
            for offset, sizes in stored.chunks(key).items():
                stored.mmap_chunk(key, offset, sizes)

    for work in (read_own_state, check_own_files, check_own_tensors):
        _on_all_ranks(folder, work)


def _on_all_ranks(folder: Path, work: Callable[[], None]) -> None:
    """Do the work of each rank; the error of the first that has one is raised on all."""
    error: UserError | None = None
    try:
        work()
    except UserError as found:
        error = found
    except OSError as found:
        error = CorruptCheckpointError(f"checkpoint file {found.filename or folder} cannot be read: {found.strerror}")
    errors = [error] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if first := next((found for found in errors if found), None):
        raise first


def newest_valid(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, which is checked then, and warnings if it is not the one that it should be.

    All ranks call it. `latest` names the chosen one afterwards.

    Returns:
        None if there never was a checkpoint.

    Raises:
        UserError: there are checkpoints, and none of them is sound; nothing was changed then.
    """
    candidates, passed_by, warnings = _from_first_rank(lambda: _candidates(checkpoints))
    damaged: list[tuple[Path, str]] = []
    for folder in candidates:
        try:
            verify_checkpoint(folder)
        except CorruptCheckpointError as error:
            damaged.append((folder, str(error)))
            continue
        moves = [(place, "damaged") for place, _ in damaged] + [(place, "later") for place in passed_by]
        faults = [fault for _, fault in damaged] + [
            f"{place} is newer than what {LATEST_FILE} names" for place in passed_by
        ]
        for fault, name in zip(faults, _from_first_rank(partial(_move_aside, moves, folder)), strict=True):
            warnings.append(f"warning: {fault}; it was moved to {name}: remove it when you do not need it")
        if damaged or warnings:
            warnings.append(f"warning: going on from {folder}")
        return folder, warnings
    if not candidates:
        return None, []
    first = "; ".join(fault for _, fault in damaged[:MAX_NAMED])
    raise UserError(
        f"{checkpoints} holds no sound checkpoint ({len(damaged)} damaged: {first}): bring a sound one back from a "
        "copy, or give the run another name to begin again"
    )


def newest_valid_up_to(checkpoints: Path, step: int) -> Path | None:
    """The newest sound checkpoint after `step` or an earlier one; None if there is none. All ranks call it."""
    for folder in _from_first_rank(lambda: complete_checkpoints(checkpoints)[::-1]):
        if checkpoint_step(folder) <= step:
            with contextlib.suppress(CorruptCheckpointError):
                verify_checkpoint(folder)
                return folder
    return None


def _from_first_rank(make: Callable[[], Any]) -> Any:
    """What `make` returns on rank 0, or the error that it raises there, on all."""
    values: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            values[0] = make()
        except (UserError, OSError) as error:
            values[1] = error
    dist.broadcast_object_list(values)
    if values[1] is not None:
        raise values[1]
    return values[0]


def _candidates(checkpoints: Path) -> tuple[list[Path], list[Path], list[str]]:
    """Checkpoints in the order in which they are to be tried, those to be passed by, and what is odd about `latest`.

    Of checkpoints that are newer than the one that it names, those that it was written after were passed by on purpose,
    by a user or a rollback; those completed after it was written only lack its being written again.
    """
    folders = step_folders(checkpoints)[::-1]
    pointer = checkpoints / LATEST_FILE
    name, named = read_latest(checkpoints)
    if named is not None:
        newer = [folder for folder in folders if folder > named and (folder / STATE_FILE).is_file()]
        written = pointer.stat().st_mtime_ns
        passed_by = [folder for folder in newer if (folder / STATE_FILE).stat().st_mtime_ns <= written]
        completed = [folder for folder in newer if folder not in passed_by]
        candidates = [*completed, named, *(folder for folder in folders if folder < named)]
        return candidates, passed_by, [f"warning: {pointer} does not name {f.name} yet" for f in completed[:1]]
    if not folders:
        if pointer.exists():
            raise UserError(f"{pointer} names {name!r}, and {checkpoints} holds no checkpoint: remove {LATEST_FILE}")
        return [], [], []
    if not pointer.exists():
        return folders, [], [f"warning: {pointer} is missing"]
    # If it names an incomplete one, what that lacks will be said.
    named_there = name in {folder.name for folder in folders}
    return folders, [], [] if named_there else [f"warning: {pointer} names no checkpoint ({name!r})"]


def _move_aside(moves: list[tuple[Path, str]], chosen: Path) -> list[Path]:
    """Let `latest` name the chosen checkpoint, then give others names that nothing looks for, with a word before."""
    if read_latest(chosen.parent)[1] != chosen:
        atomic_write_text(chosen.parent / LATEST_FILE, chosen.name + "\n")
    names = []
    for folder, word in moves:
        number, aside = 1, folder.with_name(f"{word}-{folder.name}")
        while aside.exists():
            number += 1
            aside = folder.with_name(f"{word}-{folder.name}-{number}")
        folder.rename(aside)
        names.append(aside)
    if moves:
        fsync(chosen.parent)
    return names
