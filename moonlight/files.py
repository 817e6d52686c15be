"""Write files and folders atomically; compute their checksums; lock a run folder."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from moonlight.errors import UserError, attach_path
from moonlight.progress import track_progress

SUMS_FILE = "SHA256SUMS"
VERIFICATION_FILE = "verification.json"
"""Report of `moonlight verify` on the files in SHA256SUMS, and therefore not listed in it."""

_SUM_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


def sha256_checksum(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path, known_sums: Mapping[str, str] | None = None) -> None:
    """Write the SHA-256 of every file below `folder` to `SHA256SUMS` in it, in the format of `sha256sum -c`.

    Args:
        known_sums: sums by file name that need not be computed again.
    """
    sums = {
        name: (known_sums or {}).get(name) or sha256_checksum(folder / name) for name in sorted(_list_files(folder))
    }
    atomic_write_text(folder / SUMS_FILE, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def check_sums(folder: Path) -> dict[str, str]:
    """Compare every file below `folder` with its line in `SHA256SUMS`.

    Returns:
        The SHA-256 of every file by its name relative to `folder`, except `SHA256SUMS` and `verification.json`.

    Raises:
        UserError: a file differs, is missing or not listed, or `SHA256SUMS` is missing or not in sha256sum's format.
    """
    sums = read_sums(folder / SUMS_FILE)
    files = _list_files(folder)
    if missing := sorted(sums.keys() - files):
        raise UserError(f"{folder} lacks {missing[0]}, which its {SUMS_FILE} lists: make the folder again")
    if unlisted := sorted(files - sums.keys()):
        raise UserError(f"{folder / unlisted[0]} is not listed in {SUMS_FILE}: remove it, or make the folder again")
    for name in track_progress(list(sums), "checksums"):
        if (digest := sha256_checksum(folder / name)) != sums[name]:
            raise UserError(
                f"{folder / name} has SHA-256 {digest[:12]}, {SUMS_FILE} has {sums[name][:12]}: "
                "it was changed or is corrupt; make the folder again"
            )
    return sums


def _list_files(folder: Path) -> set[str]:
    """Return the names of the files that `SHA256SUMS` of `folder` must list."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return files - {SUMS_FILE, VERIFICATION_FILE}


def read_sums(path: Path) -> dict[str, str]:
    """Return the SHA-256 by file name, from a file in the format of the sha256sum tool.

    Raises:
        UserError: the file is missing, or not in that format.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {SUMS_FILE}: it must list the SHA-256 of every file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text: it must be what the sha256sum tool writes") from None
    sums: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        match = _SUM_LINE.fullmatch(line)
        if match is None:
            raise UserError(
                f"{path}, line {number} is {line[:90]!r}: it must be 64 hexadecimal digits, two spaces, a name"
            )
        digest, name = match.groups()
        if name != PurePosixPath(name).as_posix() or name.startswith("/") or ".." in name.split("/"):
            raise UserError(f"{path}, line {number} names {name[:100]!r}: it must be a file below the folder")
        if name in sums:
            raise UserError(f"{path}, line {number} names {name[:100]!r} a second time: each file has one line")
        sums[name] = digest
    return sums


def xxh3_checksum(path: Path) -> str:
    """Return the 128-bit XXH3 checksum of a file, as hexadecimal digits.

    XXH3 is ten times as fast as SHA-256 and detects corruption equally well.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def check_space(path: Path, nbytes: int) -> None:
    """Raise UserError unless the disk of `path`, which need not exist yet, has `nbytes` free."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < nbytes:
        raise UserError(
            f"{path} needs {nbytes / 1e9:.1f} GB, its disk has {free_bytes / 1e9:.1f} GB free: choose another disk"
        )


def output_conflict_error(path: Path) -> UserError:
    """Return the error for an output that exists with content other than the command would write."""
    return UserError(f"{path} already exists with different content: choose another folder, or remove it")


def check_output(path: Path, mark: str) -> None:
    """Raise UserError, before long work, if the folder `path` exists without the file `mark`, or cannot be created."""
    if os.path.lexists(path) and not (path / mark).is_file():
        raise output_conflict_error(path)
    existing = next(entry for entry in (path.absolute(), *path.absolute().parents) if entry.exists())
    if existing != path.absolute() and not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise UserError(f"folder {existing} cannot be written: choose another folder for {path.name}")


def check_output_file(option: str, path: Path, example: str) -> None:
    """Raise UserError, before long work, unless the file `path`, which `option` sets, can be written."""
    if path.is_dir():
        raise UserError(f"{option} is {path}, a folder: give the name of a file, such as {path / example}")
    existing = next(entry for entry in path.absolute().parents if entry.exists())
    if not existing.is_dir():
        raise UserError(f"{option} is {path}: {existing} is a file; give a path in a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{option} is {path}: the folder {existing} cannot be written; give another path")


def fsync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically, and flush it to disk."""
    part = path.with_name(f".{path.name}.part")
    try:
        with attach_path(path):
            part.write_text(text, encoding="utf-8")
            fsync(part)
            part.replace(path)
            fsync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_figure(path: Path, figure: Any) -> None:
    """Write a matplotlib figure to `path` as PNG, atomically, and close the figure."""
    from matplotlib import pyplot

    part = path.with_name(f".{path.stem}.part.png")
    try:
        with attach_path(path):
            figure.savefig(part)
            part.replace(path)
    finally:
        pyplot.close(figure)
        part.unlink(missing_ok=True)


def read_json(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Return the JSON object in `path`, which must have at least the given keys.

    Raises:
        UserError: the file cannot be read, is not a JSON object, or lacks a key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it to start over, or give another folder") from None
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"{path} has no {missing[0]!r}: remove it to start over, or give another folder")
    return content


def make_folder(path: Path) -> None:
    """Create `path` and its parents; raise UserError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder {path.parent} cannot be written ({error.strerror}): choose another folder") from None


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`, which is renamed to `path` if the block ends without an exception.

    Everything in it is flushed to disk before the rename. A temporary folder that a killed process left is deleted
    first. `path` must not exist: callers decide what an existing folder means.
    """
    assert not path.exists(), path
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    make_folder(part)
    try:
        with attach_path(path):
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

    The kernel releases the lock when its holder exits for any reason, so a stale lock cannot remain.
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
