"""Code that a model wrote, run where it can do no harm: `eval/confine.py` in a process of its own, for a time."""

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
    """What one answer may use."""

    cpu_seconds: int = 5
    wall_seconds: float = 10.0
    memory_bytes: int = 1 << 30
    """Of address space, the interpreter's own included."""


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended."""

    passed: bool
    reason: str
    """`passed`, the exception, or the limit that it met."""


def run_code(program: str, limits: SandboxLimits = SandboxLimits()) -> SandboxResult:
    """Run a Python program: passed if it runs to its end without an exception.

    It gets an empty temporary folder, no environment, Python's standard library and nothing else; it can open no
    socket, start no process or thread, reach no other process and change no file. This stops accidents and mischief of
    a model's answers; it is no judge of answers that look for the grader in order to cheat.

    Raises:
        UserError: this machine cannot confine it (no Linux, or a kernel without seccomp). Nothing was run.
    """
    if sys.platform != "linux":
        raise UserError(f"code can be confined on Linux only, this is {sys.platform}: leave code-executing tasks out")
    token = secrets.token_hex(16).encode()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        result_read, result_write = _pipe(stack)
        token_read, token_write = _pipe(stack)
        os.write(token_write, token)
        words = json.dumps({"cpu_seconds": limits.cpu_seconds, "memory_bytes": limits.memory_bytes})
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_CONFINE), words, str(result_write), str(token_read)],
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
            timed_out = process.poll() is None  # not if only this process was held up
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.set_blocking(result_read, False)
        try:
            said = os.read(result_read, 4096)
        except BlockingIOError:
            said = b""
    if timed_out:
        return SandboxResult(False, f"wall limit of {limits.wall_seconds:g} s")
    if not said.startswith(b"confined "):
        reason = said.decode("utf-8", "replace").removeprefix("unconfined ") or f"exit code {process.returncode}"
        raise UserError(f"this machine does not let code be confined ({reason}): leave code-executing tasks out")
    said = said.removeprefix(b"confined ")
    if said == b"ended " + token:
        return SandboxResult(True, "passed")
    if said.startswith(b"failed "):
        return SandboxResult(False, " ".join(said.decode("utf-8", "replace").removeprefix("failed ").split())[:200])
    if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return SandboxResult(False, f"CPU limit of {limits.cpu_seconds} s")
    return SandboxResult(False, f"ended by itself with {process.returncode}")


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    """Two ends of a pipe, closed with `stack`."""
    ends = os.pipe()
    for end in ends:
        stack.callback(os.close, end)
    return ends
