"""Files and folders that appear whole or not at all, and the lock of a run folder."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moonlight.errors import UserError, naming


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, replacing it in one step."""
    part = path.with_name(f".{path.name}.part")
    try:
        with naming(path):
            part.write_text(text, encoding="utf-8")
            fsync(part)
            part.replace(path)
            fsync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, replacing `path` in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def make_folder(path: Path) -> None:
    """Make `path` and its parents; raise UserError if that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"folder {path.parent} cannot be written ({error.strerror}): choose a folder that can be made"
        ) from None


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path` that is renamed to `path` when the block ends without an exception.

    Everything in it is flushed to the disk before the rename. What a killed process left behind under the
    temporary name is removed first. `path` must not exist: callers decide what an existing folder means.
    """
    assert not path.exists(), path
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    make_folder(part)
    try:
        with naming(path):
            yield part
            for entry in sorted(part.rglob("*")):
                fsync(entry)
            fsync(part)
            part.rename(path)
            fsync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder/.lock` for this process; raise UserError if another process holds it.

    The kernel drops the lock when its holder ends, however it ends, so nothing stale is ever left.
    """
    make_folder(folder)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(
                f"{folder} is in use by another run (process {holder}): wait for it, or choose another name"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
