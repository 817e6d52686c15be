"""Start the processes of a run on one machine, without torchrun."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from moonlight.errors import CODE_HUNG, CODE_KILLED, CODE_STOPPED, DEBUG, ERROR_FILE, UserError

SECONDS_TO_REPORT = 3.0
"""How long to wait after a process failed, because another may still be writing the report of the cause."""
_PR_SET_PDEATHSIG = 1


def has_launcher() -> bool:
    """Return True if torchrun or this module started this process."""
    return "WORLD_SIZE" in os.environ


def launch(num_processes: int, arguments: Sequence[str], threads_per_process: int, max_restarts: int = 0) -> None:
    """Run `python -m pretrain *arguments` in `num_processes` local processes and wait for them.

    If one process fails, the others are killed, and all are restarted up to `max_restarts` times, except after a
    UserError. If this process dies, the kernel kills them. SIGTERM and SIGUSR1 are forwarded to the processes, which
    save; after SIGTERM they are not restarted.

    Args:
        threads_per_process: CPU threads of a process; 0 divides the cores among the processes.

    Raises:
        UserError: a process reported one.
        SystemExit: a process failed in another way and printed its error, or the run stopped on SIGTERM.
    """
    threads = threads_per_process or max(1, (os.cpu_count() or 1) // num_processes)
    workers = _WorkerGroup(num_processes, arguments, threads)
    previous_handlers = {number: signal.signal(number, workers.forward) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        restart = 0
        while (failure := workers.run(restart)) is not None:
            line, code = failure
            if code != CODE_STOPPED:
                print(line, file=sys.stderr)
            if workers.is_stopping or restart == max_restarts:
                raise SystemExit(code)
            restart += 1
            print(f"restarting all processes, restart {restart} of {max_restarts}", file=sys.stderr)
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


class _WorkerGroup:
    """The local processes of a run."""

    def __init__(self, num_processes: int, arguments: Sequence[str], threads: int) -> None:
        self._size, self._threads = num_processes, threads
        self._command = [sys.executable, "-m", "pretrain", *arguments]
        self._workers: list[subprocess.Popen] = []
        self.is_stopping = False

    def forward(self, number: int, frame: object) -> None:
        """Forward a signal to all processes; a signal handler."""
        self.is_stopping |= number == signal.SIGTERM
        for worker in self._workers:
            worker.send_signal(number)

    def run(self, restart: int) -> tuple[str, int] | None:
        """Start the processes and wait for them; return None if all succeeded, otherwise a message and an exit code."""
        with tempfile.TemporaryDirectory(prefix="moonlight-") as folder:
            try:
                for rank in range(self._size):
                    self._start(rank, Path(folder), restart)
                if self.is_stopping:  # a signal came before all processes were started
                    return _stopped_early()
                failed = _wait(self._workers)
                exited = [rank for rank, code in enumerate(_exit_codes(self._workers)) if code is not None]
                deadline = time.monotonic() + SECONDS_TO_REPORT
                while failed is not None and time.monotonic() < deadline and None in _exit_codes(self._workers):
                    time.sleep(0.1)
            finally:
                # After a failure of one process, or Ctrl-C, the others cannot save.
                workers, self._workers = self._workers, []
                for worker in workers:
                    worker.kill()
                for worker in workers:
                    worker.wait()
            files = sorted(Path(folder).glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
            reports = [json.loads(path.read_text(encoding="utf-8")) for path in files]
        if failed is None:
            if any(worker.returncode == CODE_STOPPED for worker in workers):
                self.is_stopping = True
                return "", CODE_STOPPED
            return None
        code = workers[failed].returncode
        # After a UserError in one process, the others fail in their next collective with it, so its report comes first.
        # A process that hung, or could not save in time, has printed its own message.
        causes = [report for report in reports if report["message"] is not None] or reports
        killed = next((rank for rank in exited if workers[rank].returncode < 0), None)
        if killed is not None and all(report["message"] is None for report in reports):
            failed, code, causes = killed, workers[killed].returncode, []  # the others failed because it was killed
        if causes and code not in (CODE_HUNG, CODE_KILLED):
            message = causes[0]["message"]
            if message is None or DEBUG in os.environ:
                print(causes[0]["traceback"], end="", file=sys.stderr)
            if message is not None:
                raise UserError(message)
        reason = f"code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
        if self.is_stopping and code == -signal.SIGTERM:  # it had no handler yet
            return _stopped_early()
        return f"process {failed} of {self._size} ended with {reason}", code if code > 0 else 1

    def _start(self, rank: int, folder: Path, restart: int) -> None:
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self._size),
            "OMP_NUM_THREADS": str(self._threads),
            "MOONLIGHT_RENDEZVOUS_FILE": str(folder / "rendezvous"),
            "TORCHELASTIC_RESTART_COUNT": str(restart),
            ERROR_FILE: str(folder / f"error-{rank}"),
        }
        self._workers.append(
            subprocess.Popen(self._command, env=environment, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
        )


def _stopped_early() -> tuple[str, int]:
    print("stopped before the first step; nothing to save", file=sys.stderr)
    return "", CODE_STOPPED


def die_with_parent() -> None:
    """Make the kernel kill this process when its parent dies (only on Linux).

    SIGUSR1 is ignored until the process installs a handler; otherwise it would end the process.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(workers: list[subprocess.Popen]) -> int | None:
    """Wait for the processes; return the rank of one that failed, or None if all succeeded or saved and stopped."""
    while True:
        codes = _exit_codes(workers)
        for rank, code in enumerate(codes):
            if code not in (None, 0, CODE_STOPPED):
                return rank
        if None not in codes:
            return None
        time.sleep(0.1)


def _exit_codes(workers: list[subprocess.Popen]) -> list[int | None]:
    return [worker.poll() for worker in workers]
