"""Local processes for a run on one machine, so that a laptop needs no launcher."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from moonlight.errors import ERROR_FILE, UserError

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
        _end(workers)
        messages = [path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob("error-*"))]
        if messages:
            raise UserError(messages[0])
        code = workers[failed].returncode
        print(f"process {failed} of {num_processes} ended with code {code}", file=sys.stderr)
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
