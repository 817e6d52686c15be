"""Local processes for a run on one machine, so that a laptop needs no launcher."""

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

from moonlight.errors import DEBUG, ERROR_FILE, UserError

SECONDS_TO_REPORT = 3.0
"""After one process failed, the others may still be writing down the error that made it fail."""
SECONDS_TO_END = 10.0
_PR_SET_PDEATHSIG = 1


def under_launcher() -> bool:
    """Whether torchrun, or this module, started this process."""
    return "WORLD_SIZE" in os.environ


def launch(num_processes: int, arguments: Sequence[str], threads_per_process: int) -> None:
    """Run `python -m pretrain *arguments` as a world of `num_processes` on this machine and wait for it.

    When one process fails, the others are ended. When this process dies, however, the kernel ends them.

    Raises:
        UserError: a process reported one.
        SystemExit: a process failed in another way; its output is on the screen.
    """
    threads = threads_per_process or max(1, (os.cpu_count() or 1) // num_processes)
    with tempfile.TemporaryDirectory(prefix="moonlight-") as folder:
        workers = []
        for rank in range(num_processes):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_processes),
                "OMP_NUM_THREADS": str(threads),
                "MOONLIGHT_RENDEZVOUS_FILE": str(Path(folder) / "rendezvous"),
                ERROR_FILE: str(Path(folder) / f"error-{rank}"),
            }
            command = [sys.executable, "-m", "pretrain", *arguments]
            workers.append(subprocess.Popen(command, env=environment, preexec_fn=_end_with_parent))
        try:
            failed = _wait(workers)
        except BaseException:
            _end(workers)
            raise
        if failed is None:
            return
        deadline = time.monotonic() + SECONDS_TO_REPORT
        while time.monotonic() < deadline and any(worker.poll() is None for worker in workers):
            time.sleep(0.1)
        _end(workers)
        files = sorted(Path(folder).glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    # When a user's error ends one process, the others fail in their next exchange with it.
    causes = [report for report in reports if report["message"] is not None] or reports
    if causes:
        message = causes[0]["message"]
        if message is None or DEBUG in os.environ:
            print(causes[0]["traceback"], end="", file=sys.stderr)
        if message is not None:
            raise UserError(message)
    code = workers[failed].returncode
    reason = f"code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
    print(f"process {failed} of {num_processes} ended with {reason}", file=sys.stderr)
    raise SystemExit(code if code > 0 else 1)


def _end_with_parent() -> None:
    """Ask the kernel to end this process when its parent dies (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(workers: list[subprocess.Popen]) -> int | None:
    """Wait until all ended well (None), or one did not (its number)."""
    while True:
        codes = [worker.poll() for worker in workers]
        for rank, code in enumerate(codes):
            if code:
                return rank
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.1)


def _end(workers: list[subprocess.Popen]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    deadline = time.monotonic() + SECONDS_TO_END
    for worker in workers:
        try:
            worker.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
