"""Exit a process that makes no progress, for example one that waits in a collective for a dead rank."""

import faulthandler
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Self

import torch.distributed as dist

from moonlight.errors import CODE_HUNG

FIRST_STEP = 2
"""Timeouts allowed until the first step ends: the run reads data and a checkpoint, and selects kernels."""
GROUP_TIMEOUT_FACTOR = 3
"""Timeouts after which the process groups themselves time out, in case a watchdog did not exit its process."""


class Watchdog:
    """Context manager that runs the watchdog thread.

    Time counts only while this process runs, so a process that was stopped (SIGSTOP) and continued does not time out.
    """

    def __init__(self, folder: Path, timeout_seconds: float) -> None:
        """Prepare the watchdog; the thread starts on entry.

        Args:
            folder: folder of the run. Stacks are written to its subfolder `stacks`.
            timeout_seconds: longest time without progress, in seconds.
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

    def __exit__(self, exc_type: object, exc: object, tb: object) -> None:
        self._ended.set()
        self._thread.join()

    def heartbeat(self) -> None:
        """Report progress within a step."""
        self._idle = 0.0

    def step_done(self, step: int) -> None:
        """Report that a step has ended."""
        self._step, self._allowed, self._idle = step, self._timeout, 0.0

    def _watch(self) -> None:
        tick = min(1.0, self._timeout / 10)
        while not self._ended.wait(tick):
            self._idle += tick
            if self._idle > self._allowed:
                self._exit()

    def _exit(self) -> None:
        line = (
            f"error: rank {self._rank} on {socket.gethostname()} made no progress for {self._allowed:g} s after step "
            f"{self._step} (train.hang_timeout_seconds={self._timeout:g}): a rank died or stalled; the stacks of all "
            f"threads are in {self._path}"
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
