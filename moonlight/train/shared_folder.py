"""Check that all processes of a run see the same run folder, before the run writes to it."""

import secrets
import socket
import time
from pathlib import Path

import torch.distributed as dist

from moonlight.errors import UserError, user_message
from moonlight.files import atomic_write_text

SECONDS_TO_APPEAR = 10.0
"""How long to wait for a new file: network file systems show it to other hosts with a delay."""


def check_shared(folder: Path, seconds: float = SECONDS_TO_APPEAR) -> None:
    """Check that every process can read a file that rank 0 writes into `folder`. Collective.

    Every rank writes its own file of a checkpoint. If hosts had different folders, no checkpoint would be complete.

    Args:
        folder: must exist on the host of rank 0.
        seconds: how long a process waits for the file to appear.

    Raises:
        UserError: a host sees a different folder or none, or rank 0 cannot write there; raised on all ranks.
    """
    # A random name, so that no host has a cached lookup of a missing file.
    name = f".shared-{secrets.token_hex(8)}"
    failure: str | None = None
    if dist.get_rank() == 0:
        try:
            atomic_write_text(folder / name, name)
        except OSError as error:
            failure = user_message(error) or str(error)
    broadcast = [(name, failure)]
    dist.broadcast_object_list(broadcast, src=0)
    name, failure = broadcast[0]
    if failure is not None:
        raise UserError(failure)
    file = folder / name
    try:
        results: list[tuple[str, bool]] = [("", False)] * dist.get_world_size()
        dist.all_gather_object(results, (socket.gethostname(), _appears(file, seconds)))
    finally:
        if dist.get_rank() == 0:
            file.unlink(missing_ok=True)
    if blind := sorted({host for host, is_visible in results if not is_visible}):
        raise UserError(
            f"run folder {folder.absolute()} is not the same on all hosts: {', '.join(blind)} cannot read a "
            f"file that {results[0][0]} wrote there; set runs_folder to a folder on a file system that all hosts share"
        )


def _appears(file: Path, seconds: float) -> bool:
    def is_visible() -> bool:
        try:
            return file.exists()
        except OSError:  # no permission, or a lost mount; do not raise, because the other ranks wait for the result
            return False

    deadline = time.monotonic() + seconds
    while not is_visible():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
