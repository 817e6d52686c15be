"""Saves on demand: SIGTERM saves and stops, SIGUSR1 saves and goes on, and so does a clock.

A signal may reach any of the processes, so all agree on it after every step, by one small all-reduce.
"""

import os
import select
import signal
import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist

from moonlight.config.train import TrainConfig
from moonlight.errors import CODE_KILLED

HANDLED = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class SaveRequest:
    """What the world was asked for during a step. Equal on every rank."""

    stop: bool
    save_requested: bool
    """SIGUSR1 came."""
    timer_expired: bool
    """`save_every_minutes` have passed since the last save."""

    @property
    def reason(self) -> str:
        """Of the save; empty when nothing was asked for."""
        return "SIGTERM" if self.stop else "SIGUSR1" if self.save_requested else "clock" if self.timer_expired else ""


class SignalHandler:
    """Takes the signals while it is entered, which only the main thread may do.

    A thread hears of them, so that the grace time runs while the main thread waits in a collective.
    """

    def __init__(self, train_config: TrainConfig) -> None:
        self._grace_seconds, self._minutes = train_config.grace_seconds, train_config.save_every_minutes
        self._stop = False
        self._saves_asked = self._saves_agreed = 0
        self._saved_at = time.monotonic()
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._former_descriptor = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # The handler has nothing to do: with one, the interpreter writes the number of the signal into the pipe.
        self._former_handlers = {number: signal.signal(number, lambda *_: None) for number in HANDLED}
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_descriptor)
        os.write(self._writer, b"\0")  # no signal has this number
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def _listen(self) -> None:
        deadline = None
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._reader], [], [], left)[0]:
                self._leave()
            for number in os.read(self._reader, 256):
                if number == 0:
                    return
                if number == signal.SIGTERM:
                    self._stop = True
                    deadline = deadline or time.monotonic() + self._grace_seconds
                elif number == signal.SIGUSR1:
                    self._saves_asked += 1

    def _leave(self) -> None:
        print(
            f"error: rank {dist.get_rank()} could not save within train.grace_seconds ({self._grace_seconds}) after "
            "SIGTERM, and ends; the last checkpoint stands",
            file=sys.stderr,
            flush=True,
        )
        os._exit(CODE_KILLED)

    def reset_timer(self) -> None:
        """A checkpoint was written, for whatever reason: the clock begins again."""
        self._saved_at = time.monotonic()

    def poll_all_ranks(self) -> SaveRequest:
        """What any rank was asked for since the last call; all ranks must call it."""
        asked = self._saves_asked
        is_due = 0 < self._minutes * 60 <= time.monotonic() - self._saved_at
        flags = [self._stop, asked > self._saves_agreed, is_due]
        self._saves_agreed = asked
        agreed = torch.tensor(flags, dtype=torch.int32, device=torch.cuda.current_device())
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        stop, save, is_due = (bool(flag) for flag in agreed.tolist())
        return SaveRequest(stop, save, is_due)
