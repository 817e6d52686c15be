"""Files written past the page cache, where the file system can do that.

Of gigabytes that are flushed to the disk at once anyway, half of the time and nine tenths of the CPU time go into
copying them into the page cache, which pushes out what others have there.
"""

import contextlib
import errno
import fcntl
import mmap
import os
from pathlib import Path

BLOCK_BYTES = 8 << 20
"""Written at once. A multiple of every file system's block."""
ALIGNMENT = 4096


class DirectFile:
    """A new file to append to."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        direct = getattr(os, "O_DIRECT", 0)
        try:
            self._descriptor = os.open(path, flags | direct, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            with contextlib.suppress(FileNotFoundError):  # some systems make the file before they refuse
                path.unlink()
            self._descriptor = os.open(path, flags, 0o666)
            direct = 0
        self._direct = direct
        self._block = mmap.mmap(-1, BLOCK_BYTES)  # aligned to a page
        self._filled = 0

    def write(self, raw: memoryview) -> None:
        """Append bytes."""
        while raw:
            taken = raw[: BLOCK_BYTES - self._filled]
            self._block[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            raw = raw[len(taken) :]
            if self._filled == BLOCK_BYTES:
                self._flush()

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            os.close(self._descriptor)

    def _flush(self) -> None:
        block = memoryview(self._block)[: self._filled]
        self._filled = 0
        while block:
            if self._direct and len(block) % ALIGNMENT:  # the end of the file, or after a write that was cut short
                flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~self._direct)
                self._direct = 0
            block = block[os.write(self._descriptor, block) :]
