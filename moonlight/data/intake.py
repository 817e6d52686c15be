"""Record batching: read records into batches, count and quarantine the unusable ones."""

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
    """Batches of documents from the records of files. Counts empty and bad records, and quarantines the bad ones."""

    def __init__(self, quarantine: Path, read: Callable[[Path], Iterator[Record]]) -> None:
        """`read` yields the records of a file; bad records are written to the file `quarantine`, as JSONL."""
        self.documents = self.empty = 0
        self.reasons: Counter[str] = Counter()
        """Number of bad records of each kind; the kind is the reason up to its colon."""
        self.first_bad: dict[str, str] = {}
        """File, line and reason of the first bad record of each kind."""
        self._quarantine_path, self._read = quarantine, read
        self._file: TextIO | None = None

    @property
    def bad(self) -> int:
        """Number of bad records of all kinds."""
        return self.reasons.total()

    def batches(self, files_by_input: list[list[Path]]) -> Iterator[DocumentBatch]:
        """Yield batches of about 512 KiB of text, from the files of each input in turn."""
        batch, size, before = DocumentBatch(), 0, 0
        for source, file in ((source, file) for source, files in enumerate(files_by_input) for file in files):
            for record in self._read(file):
                batch.position = before + record.position
                if record.text is None:
                    self._quarantine(file, record.line, record.reason)
                elif not record.text:
                    self.empty += 1
                else:
                    self.documents += 1
                    batch.raw.append(record.text.encode())
                    batch.sources.append(source)
                    batch.locations.append((file, record.line))
                    size += len(batch.raw[-1])
                if size >= BATCH_BYTES:
                    yield batch
                    batch, size = DocumentBatch(position=batch.position), 0
            before += file.stat().st_size
        if batch.raw:
            yield batch

    def reject(self, location: tuple[Path, int], reason: str) -> None:
        """Quarantine a document that was yielded in a batch."""
        self.documents -= 1
        self._quarantine(*location, reason)

    def check(self, max_bad_share: float) -> None:
        """Raise UserError if the fraction of bad records exceeds `max_bad_share`, or there is no document."""
        records = self.documents + self.bad + self.empty
        first = next(iter(self.first_bad.values()), "")
        if self.bad > max_bad_share * records:
            raise UserError(
                f"{self.bad} of {records} records ({self.bad / records:.2%}) are unusable, more than max_bad_share "
                f"{max_bad_share} allows: fix them, or set --max-bad-share; the first is {first}"
            )
        if not self.documents:
            details = f", {self.bad} of them bad, the first {first}" if self.bad else ""
            raise UserError(f"the inputs hold no documents ({records} records, {self.empty} of them empty{details})")

    def close(self) -> None:
        """Close the quarantine file."""
        if self._file:
            self._file.close()

    def _quarantine(self, file: Path, line: int, reason: str) -> None:
        if self._file is None:
            self._file = self._quarantine_path.open("w", encoding="utf-8")
        kind = reason.partition(":")[0]
        self.reasons[kind] += 1
        self.first_bad.setdefault(kind, f"{file}, line {line}: {reason}")
        self._file.write(json.dumps({"file": str(file), "line": line, "reason": reason}) + "\n")
