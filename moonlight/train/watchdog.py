"""Ends a process that makes no progress, as one does that waits in a collective for a rank which never comes."""

import faulthandler
import os
import socket
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from moonlight.errors import CODE_HUNG

FIRST_STEP = 2
"""Until the first step has ended, when data and checkpoint are read and kernels chosen, so many timeouts may pass."""
GROUP_TIMEOUT_FACTOR = 3
"""After so many timeouts the process groups themselves give up, should a watchdog not have ended its process."""


class Watchdog:
    """Watches from a thread while it is entered.

    Time counts only while this process runs: one that was stopped and continued has not been hanging.
    """

    def __init__(self, folder: Path, timeout_seconds: float) -> None:
        """Args:
        folder: of the run; stacks go to its folder `stacks`.
        """
        self._rank = dist.get_rank()
        self._path = folder / "stacks" / f"rank-{self._rank:05d}.txt"
        self._timeout = timeout_seconds
        self._step, self._allowed, self._idle = 0, FIRST_STEP * timeout_seconds, 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def heartbeat(self) -> None:
        """Something was done that is less than a step."""
        self._idle = 0.0

    def step_done(self, step: int) -> None:
        """A step has ended."""
        self._step, self._allowed, self._idle = step, self._timeout, 0.0

    def _watch(self) -> None:
        tick = min(1.0, self._timeout / 10)
        while not self._ended.wait(tick):
            self._idle += tick
            if self._idle > self._allowed:
                self._end()

    def _end(self) -> None:
        line = (
            f"error: rank {self._rank} on {socket.gethostname()} made no progress for {self._allowed:g} s after step "
            f"{self._step} (train.hang_timeout_seconds={self._timeout:g}): a rank is gone or far too slow; what every "
            f"thread does stands in {self._path}"
        )
        print(line, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
        finally:
            os._exit(CODE_HUNG)
