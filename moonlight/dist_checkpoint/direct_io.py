"""Write and read files with O_DIRECT, past the page cache, where the file system supports that.

A checkpoint has gigabytes that are flushed to disk immediately, or read once. Through the page cache, half of the time
and nine tenths of the CPU time go into its pages, which evict pages of other processes.
"""

import contextlib
import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

BLOCK_BYTES = 8 << 20
"""Size of one write, in bytes. A multiple of every file system's block size."""
MAX_BLOCKS_IN_FLIGHT = 8
"""Including the block that is being filled."""
DIRECT_IO_ALIGNMENT = 4096
"""Alignment of memory, file offset and length, in bytes."""


def read_direct(path: Path, start: int, nbytes: int) -> np.ndarray:
    """Return `nbytes` bytes of a file from byte `start`, as uint8 [nbytes]; fewer if the file ends earlier."""
    aligned_start = start - start % DIRECT_IO_ALIGNMENT
    length = start + nbytes - aligned_start
    memory = np.empty(length + 2 * DIRECT_IO_ALIGNMENT, np.uint8)
    lead = -memory.ctypes.data % DIRECT_IO_ALIGNMENT
    aligned = memory[lead : lead + length + -length % DIRECT_IO_ALIGNMENT].data
    read, direct = 0, getattr(os, "O_DIRECT", 0)
    while read < length:
        try:
            descriptor = os.open(path, os.O_RDONLY | direct)
            try:
                while read < length and (count := os.preadv(descriptor, [aligned[read:]], aligned_start + read)):
                    read += count
            finally:
                os.close(descriptor)
            break
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
            direct = 0  # some systems reject the flag, or a read that continues after a short one
    return memory[lead + start - aligned_start : lead + min(read, length)]


def direct_xxh3_checksum(path: Path) -> str:
    """Return the checksum of `moonlight.files.xxh3_checksum`, without leaving the file in the page cache."""
    digest = xxhash.xxh3_128()
    for start in range(0, path.stat().st_size, BLOCK_BYTES):
        digest.update(read_direct(path, start, BLOCK_BYTES).data)
    return digest.hexdigest()


class DirectFile:
    """A new file to append to. The next block is filled while earlier blocks are being written.

    Raises:
        OSError: the file already exists, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        direct = getattr(os, "O_DIRECT", 0)
        try:
            self._descriptor = os.open(path, flags | direct, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            with contextlib.suppress(FileNotFoundError):  # some systems create the file before they reject the flag
                path.unlink()
            self._descriptor = os.open(path, flags, 0o666)
            direct = 0
        self._direct = direct
        blocks = (mmap.mmap(-1, BLOCK_BYTES) for _ in range(MAX_BLOCKS_IN_FLIGHT))  # aligned to a page
        self._blocks = deque(np.frombuffer(block, np.uint8) for block in blocks)
        self._filled = 0
        self._thread = ThreadPoolExecutor(1)
        self._in_flight: deque[Future[None]] = deque()

    def write(self, raw: memoryview) -> None:
        """Append bytes."""
        remaining = np.frombuffer(raw, np.uint8)
        while remaining.size:
            chunk = remaining[: BLOCK_BYTES - self._filled]
            self._blocks[0][self._filled : self._filled + chunk.size] = chunk
            self._filled += chunk.size
            remaining = remaining[chunk.size :]
            if self._filled == BLOCK_BYTES:
                self._submit()

    def sync(self) -> None:
        """Flush everything to disk; do not append after that."""
        self._submit()
        self._wait(0)
        os.fsync(self._descriptor)

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(self, exc_type: object, *_: object) -> None:
        try:
            if exc_type is None:
                self._submit()
                self._wait(0)
        finally:
            self._thread.shutdown(cancel_futures=True)
            os.close(self._descriptor)

    def _submit(self) -> None:
        self._in_flight.append(self._thread.submit(self._write_block, self._blocks[0][: self._filled].data))
        self._blocks.rotate(-1)
        self._filled = 0
        self._wait(MAX_BLOCKS_IN_FLIGHT - 1)

    def _wait(self, max_in_flight: int) -> None:
        """Wait until at most `max_in_flight` blocks are in flight; raise the error of a failed write."""
        while len(self._in_flight) > max_in_flight:
            self._in_flight.popleft().result()

    def _write_block(self, block: memoryview) -> None:
        while block:
            # A length that is not aligned: the end of the file, or the rest after a short write.
            if self._direct and len(block) % DIRECT_IO_ALIGNMENT:
                self._disable_direct()
            try:
                block = block[os.write(self._descriptor, block) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._disable_direct()  # some systems reject the flag only here

    def _disable_direct(self) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~self._direct)
        self._direct = 0
