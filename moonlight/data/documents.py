"""Read documents from text files, JSONL and Parquet, one record at a time.

A document is a text file, the text field of a JSONL line, or the text column of a Parquet row. Input that cannot be
read as text becomes a bad record with its location and reason; reading continues with the next record.
"""

import contextlib
import gzip
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from moonlight.errors import UserError
from moonlight.files import sha256_checksum

SKIPPED_NAMES = frozenset({"site-packages", "dist-packages", "__pycache__", "node_modules", "test", "tests"})
"""Folders that `iter_files` does not enter: installed packages, build products and tests."""

_RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_SNIFFED_BYTES = 8192
_PARQUET_BATCH_ROWS = 1024


ExtractText = Callable[[dict[str, Any]], tuple[str | None, str]]
"""Function from a JSON object to (its text, ""), or to (None, the reason why it has no text)."""


class Record(NamedTuple):
    """One document, or one bad record: its `text` is None, and `reason` states why."""

    file: Path
    line: int
    """Line of a JSONL file or row of a Parquet file, from 1; 1 for a text file."""
    text: str | None
    """Always encodable as UTF-8. May be empty: the caller skips and counts empty records."""
    reason: str
    position: int
    """Bytes of the file consumed up to the end of this record; for progress only."""


def iter_files(inputs: Sequence[Path], skipped_names: Collection[str] = SKIPPED_NAMES) -> list[Path]:
    """Return the files of `inputs`, without duplicates, in an order that depends on names alone.

    A file in `inputs` is always included. A folder is walked recursively. The walk skips hidden entries (leading dot),
    folders named in `skipped_names`, links to folders, and binary files (a NUL among the first 8192 bytes). The number
    of skipped binary files is printed to stderr.

    Raises:
        UserError: an input does not exist, cannot be read, or is a folder without usable files.
    """
    files: dict[Path, None] = {}
    for path in inputs:
        if path.is_dir():
            folder_files = dict.fromkeys(_walk(path, skipped_names))
            if not folder_files:
                raise UserError(
                    f"input {path} has no files of text: give a folder with text, .jsonl, .jsonl.gz or .parquet files"
                )
            files.update(folder_files)
        elif path.exists():
            _check_readable(path)
            files[path] = None
        else:
            raise UserError(
                f"input {path} does not exist: give a text, .jsonl, .jsonl.gz or .parquet file, or a folder"
            )
    return list(files)


def fingerprint(files: Sequence[Path]) -> str:
    """Return the SHA-256 of the content of `files` and their paths relative to their common folder, as hex digits.

    Moving that folder does not change the result; renaming, adding, removing or editing a file does.

    Raises:
        UserError: a file cannot be read.
    """
    digest = hashlib.sha256()
    common = os.path.commonpath([file.absolute().parent for file in files]) if files else ""
    for file in files:
        name = os.path.relpath(file.absolute(), common)
        with _reading(file):
            line = json.dumps([name, file.stat().st_size, sha256_checksum(file)])
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def read_records(file: Path, text_field: str = "text") -> Iterator[Record]:
    """Yield every record of one file; its suffix determines its format.

    Args:
        text_field: key of a JSONL object, or Parquet column, that holds the document.

    Raises:
        UserError: the file cannot be opened.
    """
    with _reading(file), file.open("rb") as stream:
        if file.name.endswith(".parquet"):
            yield from _read_parquet(file, stream, text_field)
        elif file.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _read_jsonl(file, stream, partial(_extract_text, text_field=text_field))
        else:
            yield _read_text(file, stream)


def _walk(folder: Path, skipped_names: Collection[str]) -> Iterator[Path]:
    num_binary = num_files = 0
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skipped_names)
        for name in sorted(names):
            path = Path(parent, name)
            if name.startswith(".") or not path.is_file():
                continue
            if b"\0" in _check_readable(path) and not name.endswith(_RECORD_SUFFIXES):
                num_binary += 1
                continue
            num_files += 1
            yield path
    if num_binary and num_files:
        print(f"{folder}: skipped {num_binary} binary files", file=sys.stderr)


def _check_readable(path: Path) -> bytes:
    """Return the first bytes of a file; raise UserError if it cannot be read."""
    with _reading(path), path.open("rb") as stream:
        return stream.read(_SNIFFED_BYTES)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Convert system errors to a UserError that names the input `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"input {path} cannot be read: {error.strerror or error}") from None


def _raise_unreadable(error: OSError) -> None:
    with _reading(error.filename):
        raise error


def _read_text(file: Path, stream: BinaryIO) -> Record:
    raw = stream.read()
    if b"\0" in raw:
        return Record(file, 1, None, "contains a NUL byte, so it is not text", len(raw))
    try:
        return Record(file, 1, raw.decode("utf-8-sig"), "", len(raw))
    except UnicodeDecodeError as error:
        return Record(file, 1, None, f"not UTF-8: {error.reason} at byte {error.start}", len(raw))


def read_lines(file: Path, extract_text: ExtractText) -> Iterator[Record]:
    """Yield every line of a .jsonl or .jsonl.gz file; `extract_text` gets the text of its JSON object.

    Raises:
        UserError: the file cannot be opened.
    """
    with _reading(file), file.open("rb") as stream:
        yield from _read_jsonl(file, stream, extract_text)


def _read_jsonl(file: Path, stream: BinaryIO, extract_text: ExtractText) -> Iterator[Record]:
    lines: Any = gzip.GzipFile(fileobj=stream) if file.name.endswith(".gz") else stream
    line_number = 0
    try:
        # Split lines as bytes, so that a line that is not UTF-8 does not affect other lines.
        for line_number, line in enumerate(lines, start=1):
            if line.strip():
                text, reason = _parse_json_line(line, extract_text)
            else:
                text, reason = "", ""
            yield Record(file, line_number, text, reason, stream.tell())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield Record(file, line_number + 1, None, f"corrupt gzip stream: {error}", stream.tell())


def _parse_json_line(line: bytes, extract_text: ExtractText) -> tuple[str | None, str]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return None, f"not UTF-8: {error.reason} at byte {error.start} of the line"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"
    if not isinstance(value, dict):
        return None, f"a JSON object is expected, not {type(value).__name__}"
    return extract_text(value)


def _extract_text(value: dict[str, Any], text_field: str) -> tuple[str | None, str]:
    if text_field not in value:
        return None, f"no field {text_field!r}"
    return check_text(value[text_field], f"field {text_field!r}")


def _read_parquet(file: Path, stream: BinaryIO, text_field: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    size, row = file.stat().st_size, 0
    try:
        table = pyarrow.parquet.ParquetFile(stream)
        num_rows = table.metadata.num_rows
        if text_field not in table.schema_arrow.names:
            # One bad record per row, so that the fraction of bad records is the fraction of the corpus that is lost.
            for row in range(1, num_rows + 1):
                yield Record(file, row, None, f"no column {text_field!r}", size * row // num_rows)
            return
        for batch in table.iter_batches(_PARQUET_BATCH_ROWS, columns=[text_field]):
            for scalar in batch.column(text_field):
                row += 1
                try:
                    text, reason = check_text(scalar.as_py(), f"column {text_field!r}")
                except UnicodeDecodeError as error:
                    text, reason = None, f"not UTF-8: {error.reason} at byte {error.start}"
                yield Record(file, row, text, reason, size * row // num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        yield Record(file, row + 1, None, f"corrupt Parquet file: {' '.join(str(error).split())[:200]}", size)


def check_text(value: Any, name: str) -> tuple[str | None, str]:
    """Return (`value`, "") if `value` is a string that UTF-8 can encode, otherwise (None, the reason)."""
    if not isinstance(value, str):
        return None, f"{name} holds {type(value).__name__}, not text"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return None, f"{name} has half of a surrogate pair at character {error.start}"
    return value, ""
