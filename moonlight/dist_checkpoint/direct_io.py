"""Files written and read past the page cache, where the file system can do that.

Of gigabytes that are flushed to the disk at once anyway, or read once, half of the time and nine tenths of the CPU time
go into pages of the page cache, which push out what others have there.
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
"""Written at once. A multiple of every file system's block."""
BLOCKS = 8
"""On their way at most, the one that is being filled included."""
DIRECT_IO_ALIGNMENT = 4096


def read_direct(path: Path, start: int, nbytes: int) -> np.ndarray:
    """[nbytes] uint8 of a file from byte `start` on; fewer where the file ends."""
    begin = start - start % DIRECT_IO_ALIGNMENT
    wanted = start + nbytes - begin
    memory = np.empty(wanted + 2 * DIRECT_IO_ALIGNMENT, np.uint8)
    lead = -memory.ctypes.data % DIRECT_IO_ALIGNMENT
    aligned = memory[lead : lead + wanted + -wanted % DIRECT_IO_ALIGNMENT].data
    read, direct = 0, getattr(os, "O_DIRECT", 0)
    while read < wanted:
        try:
            descriptor = os.open(path, os.O_RDONLY | direct)
            try:
                while read < wanted and (more := os.preadv(descriptor, [aligned[read:]], begin + read)):
                    read += more
            finally:
                os.close(descriptor)
            break
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
            direct = 0  # some systems refuse the flag, or to go on where a read was cut short
    return memory[lead + start - begin : lead + min(read, wanted)]


def direct_xxh3_checksum(path: Path) -> str:
    """`moonlight.files.checksum_of`, for a file that need not be in the page cache afterwards."""
    digest = xxhash.xxh3_128()
    for start in range(0, path.stat().st_size, BLOCK_BYTES):
        digest.update(read_direct(path, start, BLOCK_BYTES).data)
    return digest.hexdigest()


class DirectFile:
    """A new file to append to. While blocks are on their way to the disk, the next one is filled."""

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
        blocks = (mmap.mmap(-1, BLOCK_BYTES) for _ in range(BLOCKS))  # aligned to a page
        self._blocks = deque(np.frombuffer(block, np.uint8) for block in blocks)
        self._filled = 0
        self._thread = ThreadPoolExecutor(1)
        self._under_way: deque[Future[None]] = deque()

    def write(self, raw: memoryview) -> None:
        """Append bytes."""
        left = np.frombuffer(raw, np.uint8)
        while left.size:
            taken = left[: BLOCK_BYTES - self._filled]
            self._blocks[0][self._filled : self._filled + taken.size] = taken
            self._filled += taken.size
            left = left[taken.size :]
            if self._filled == BLOCK_BYTES:
                self._send()

    def sync(self) -> None:
        """Flush everything to the disk; nothing may be appended after that."""
        self._send()
        self._arrive(0)
        os.fsync(self._descriptor)

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._send()
                self._arrive(0)
        finally:
            self._thread.shutdown(cancel_futures=True)
            os.close(self._descriptor)

    def _send(self) -> None:
        self._under_way.append(self._thread.submit(self._put, self._blocks[0][: self._filled].data))
        self._blocks.rotate(-1)
        self._filled = 0
        self._arrive(BLOCKS - 1)

    def _arrive(self, left: int) -> None:
        """Wait until so many blocks are left on their way; raises what went wrong with one."""
        while len(self._under_way) > left:
            self._under_way.popleft().result()

    def _put(self, block: memoryview) -> None:
        while block:
            if (
                self._direct and len(block) % DIRECT_IO_ALIGNMENT
            ):  # the end of the file, or after a write that was cut short
                self._give_up_direct()
            try:
                block = block[os.write(self._descriptor, block) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._give_up_direct()  # some systems refuse no earlier

    def _give_up_direct(self) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~self._direct)
        self._direct = 0
