"""What goes into preparing: records read into batches, and those that cannot be used set aside and counted."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from moonlight.data.documents import Record
from moonlight.data.encode import DocumentBatch
from moonlight.errors import UserError

BATCH_BYTES = 1 << 19


class RecordBatcher:
    """Reads records into batches, counts what is empty or bad, and writes the bad ones down."""

    def __init__(self, quarantine: Path, read: Callable[[Path], Iterator[Record]]) -> None:
        """`read` gives the records of a file."""
        self.documents = self.empty = 0
        self.reasons: Counter[str] = Counter()
        """How many bad records there are of each kind: the reason up to its colon."""
        self.first_bad: dict[str, str] = {}
        """The first of each kind, with its file and line."""
        self._quarantine, self._read = quarantine, read
        self._file: TextIO | None = None

    @property
    def bad(self) -> int:
        """Bad records of all kinds."""
        return self.reasons.total()

    def batches(self, files_of: list[list[Path]]) -> Iterator[DocumentBatch]:
        """Batches of about 512 KiB of text, from the files of each input in turn."""
        batch, size, before = DocumentBatch(), 0, 0
        for source, file in ((source, file) for source, files in enumerate(files_of) for file in files):
            for record in self._read(file):
                batch.position = before + record.position
                if record.text is None:
                    self._set_aside(file, record.line, record.reason)
                elif not record.text:
                    self.empty += 1
                else:
                    self.documents += 1
                    batch.raw.append(record.text.encode())
                    batch.sources.append(source)
                    batch.places.append((file, record.line))
                    size += len(batch.raw[-1])
                if size >= BATCH_BYTES:
                    yield batch
                    batch, size = DocumentBatch(position=batch.position), 0
            before += file.stat().st_size
        if batch.raw:
            yield batch

    def reject(self, location: tuple[Path, int], reason: str) -> None:
        """Set a document aside after all."""
        self.documents -= 1
        self._set_aside(*location, reason)

    def check(self, max_bad_share: float) -> None:
        """Raise UserError if too many records were bad, or none was a document."""
        records = self.documents + self.bad + self.empty
        first = next(iter(self.first_bad.values()), "")
        if self.bad > max_bad_share * records:
            raise UserError(
                f"{self.bad} of {records} records ({self.bad / records:.2%}) cannot be used, more than "
                f"max_bad_share {max_bad_share} allows; the first is {first}"
            )
        if not self.documents:
            more = f", {self.bad} of them bad, the first {first}" if self.bad else ""
            raise UserError(f"the inputs hold no documents ({records} records, {self.empty} of them empty{more})")

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _set_aside(self, file: Path, line: int, reason: str) -> None:
        if self._file is None:
            self._file = self._quarantine.open("w", encoding="utf-8")
        kind = reason.partition(":")[0]
        self.reasons[kind] += 1
        self.first_bad.setdefault(kind, f"{file}, line {line}: {reason}")
        self._file.write(json.dumps({"file": str(file), "line": line, "reason": reason}) + "\n")
