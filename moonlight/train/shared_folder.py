"""Proof, before a run writes anything of worth, that all its processes see one run folder."""

import secrets
import socket
import time
from pathlib import Path

import torch.distributed as dist

from moonlight.errors import UserError, user_message
from moonlight.files import atomic_write_text

SECONDS_TO_APPEAR = 10.0
"""Network file systems show a new file to other hosts with a delay."""


def check_shared(folder: Path, seconds: float = SECONDS_TO_APPEAR) -> None:
    """Check that what rank 0 writes into `folder`, which must exist there, every other process can read.

    Every rank writes its part of a checkpoint, so hosts with folders of their own would leave none whole. All
    processes must call this; it ends on all of them together.

    Raises:
        UserError: on every rank: hosts see another folder, or none, or rank 0 cannot write there.
    """
    # A name that no host looked up before: none can remember that it was not there.
    name = f".shared-{secrets.token_hex(8)}"
    failure: str | None = None
    if dist.get_rank() == 0:
        try:
            atomic_write_text(folder / name, name)
        except OSError as error:
            failure = user_message(error) or str(error)
    said = [(name, failure)]
    dist.broadcast_object_list(said, src=0)
    name, failure = said[0]
    if failure is not None:
        raise UserError(failure)
    file = folder / name
    try:
        seen: list[tuple[str, bool]] = [("", False)] * dist.get_world_size()
        dist.all_gather_object(seen, (socket.gethostname(), _appears(file, seconds)))
    finally:
        if dist.get_rank() == 0:
            file.unlink(missing_ok=True)
    if blind := sorted({host for host, sees in seen if not sees}):
        raise UserError(
            f"run folder {folder.absolute()} is not the same on all hosts: {', '.join(blind)} cannot read what "
            f"{seen[0][0]} wrote there; set runs_folder to a folder on a file system that all hosts share"
        )


def _appears(file: Path, seconds: float) -> bool:
    def is_there() -> bool:
        try:
            return file.exists()
        except OSError:  # no permission, or a mount that has gone: not to be raised, the others wait for the answer
            return False

    deadline = time.monotonic() + seconds
    while not is_there():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
