"""Save on demand: SIGTERM saves and stops; SIGUSR1 and a timer save and continue.

A signal may reach any one of the processes. So all ranks agree on it after every step, with one small all-reduce.
"""

import os
import select
import signal
import sys
import threading
import time
from typing import Self

import torch
import torch.distributed as dist

from moonlight.config.train import TrainConfig
from moonlight.errors import CODE_KILLED

HANDLED = (signal.SIGTERM, signal.SIGUSR1)


class SignalHandler:
    """Context manager that handles the signals; only the main thread may enter it.

    A separate thread reads the signals, so that the grace period also runs while the main thread waits in a collective.
    """

    def __init__(self, train_config: TrainConfig) -> None:
        self._grace_seconds, self._minutes = train_config.grace_seconds, train_config.save_every_minutes
        self._stop = False
        self._saves_requested = self._saves_agreed = 0
        self._saved_at = time.monotonic()
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._former_descriptor = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # The handler does nothing, but with a handler the interpreter writes the signal number to the pipe.
        self._former_handlers = {number: signal.signal(number, lambda *_: None) for number in HANDLED}
        self._thread.start()
        return self

    def __exit__(self, exc_type: object, exc: object, tb: object) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_descriptor)
        os.write(self._writer, b"\0")  # ends the thread: no signal has this number
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def _listen(self) -> None:
        deadline = None
        while True:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._reader], [], [], remaining)[0]:
                self._exit_without_save()
            for number in os.read(self._reader, 256):
                if number == 0:
                    return
                if number == signal.SIGTERM:
                    self._stop = True
                    deadline = deadline or time.monotonic() + self._grace_seconds
                elif number == signal.SIGUSR1:
                    self._saves_requested += 1

    def _exit_without_save(self) -> None:
        print(
            f"error: rank {dist.get_rank()} could not save within train.grace_seconds ({self._grace_seconds}) after "
            "SIGTERM, exiting; the last checkpoint is valid",
            file=sys.stderr,
            flush=True,
        )
        os._exit(CODE_KILLED)

    def reset_timer(self) -> None:
        """Restart the timer of `save_every_minutes`; called after every save, whatever its reason."""
        self._saved_at = time.monotonic()

    def poll_all_ranks(self) -> str:
        """Return why to save now, equal on all ranks: SIGTERM or SIGUSR1 of any rank, clock, or "". Collective."""
        num_requested = self._saves_requested
        is_due = 0 < self._minutes * 60 <= time.monotonic() - self._saved_at
        flags = [self._stop, num_requested > self._saves_agreed, is_due]
        self._saves_agreed = num_requested
        agreed = torch.tensor(flags, dtype=torch.int32, device=torch.cuda.current_device())
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        reasons = zip(("SIGTERM", "SIGUSR1", "clock"), agreed.tolist(), strict=True)
        return next((reason for reason, flag in reasons if flag), "")
