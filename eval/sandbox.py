"""Sandbox for code that a model writes: a separate process that runs `eval/confine.py`, with a time limit."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from moonlight.errors import UserError

_CONFINE = Path(__file__).with_name("confine.py")


@dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    """Resource limits of one answer."""

    cpu_seconds: int = 5
    wall_seconds: float = 10.0
    memory_bytes: int = 1 << 30
    """Address space, including the interpreter's."""


@dataclass(frozen=True)
class SandboxResult:
    """Outcome of a program."""

    passed: bool
    reason: str
    """`passed`, the exception, or the limit that it exceeded."""


def run_code(program: str, limits: SandboxLimits = SandboxLimits()) -> SandboxResult:
    """Run a Python program; it passes if it runs to its end without an exception.

    The program gets an empty temporary folder, an empty environment and Python's standard library. It cannot open
    sockets, start processes or threads, access other processes or change files. This stops accidental and malicious
    damage; it does not detect a program that manipulates the grader to pass.

    Raises:
        UserError: this machine cannot confine the program (not Linux, or a kernel without seccomp); it did not run.
    """
    if sys.platform != "linux":
        raise UserError(f"code can be confined on Linux only, not on {sys.platform}: leave out tasks that execute code")
    token = secrets.token_hex(16).encode()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        result_read, result_write = _pipe(stack)
        token_read, token_write = _pipe(stack)
        os.write(token_write, token)
        limits_json = json.dumps({"cpu_seconds": limits.cpu_seconds, "memory_bytes": limits.memory_bytes})
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_CONFINE), limits_json, str(result_write), str(token_read)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(result_write, token_read),
            cwd=folder,
            env={},
            start_new_session=True,
        )
        timed_out = False
        try:
            process.communicate(program.encode("utf-8", "replace"), timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired:
            timed_out = process.poll() is None  # the program may have ended while this process was delayed
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.set_blocking(result_read, False)
        try:
            message = os.read(result_read, 4096)
        except BlockingIOError:
            message = b""
    if timed_out:
        return SandboxResult(False, f"wall limit of {limits.wall_seconds:g} s")
    if not message.startswith(b"confined "):
        reason = message.decode("utf-8", "replace").removeprefix("unconfined ") or f"exit code {process.returncode}"
        raise UserError(f"this machine cannot confine code ({reason}): leave out tasks that execute code")
    message = message.removeprefix(b"confined ")
    if message == b"ended " + token:
        return SandboxResult(True, "passed")
    if message.startswith(b"failed "):
        return SandboxResult(False, " ".join(message.decode("utf-8", "replace").removeprefix("failed ").split())[:200])
    if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return SandboxResult(False, f"CPU limit of {limits.cpu_seconds} s")
    return SandboxResult(False, f"ended early with exit code {process.returncode}")


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    """Return the read and write ends of a pipe, closed with `stack`."""
    ends = os.pipe()
    for end in ends:
        stack.callback(os.close, end)
    return ends
