"""Processes of the serving test: each has a log and a time limit, and none is left running."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LIMIT_S = 900
"""Time limit of a command, and of a server's first response."""
TERMINATE_S = 15
"""Time limit for a server to exit after SIGTERM."""
LINES_OF_LOG = 30


class Failed(Exception):
    """A command or server failed. The message names it and has the end of its log."""

    def __init__(self, what: str, log: Path) -> None:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        super().__init__("\n".join([f"{what}; {log} ends with:", *(f"    {line}" for line in lines[-LINES_OF_LOG:])]))
        self.log = log


@contextlib.contextmanager
def started(command: list[Any], log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen]:
    """Run a command in the background. Kill its process group when the block ends."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        # SIGTERM first, so that shared memory is freed; then SIGKILL for the rest of the group.
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal_number)
                process.wait(TERMINATE_S)


def run(command: list[Any], log: Path, environment: Mapping[str, str]) -> None:
    """Run a command to its end. Raise Failed unless it exits with 0 in time."""
    with started(command, log, environment) as process:
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise Failed(f"{command[0]} did not end within {LIMIT_S} s", log) from None
    if code:
        raise Failed(f"{command[0]} exited with {code}", log)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until_ready(process: subprocess.Popen, url: str, log: Path) -> None:
    """Wait until a server answers `url`. Raise Failed if it exits first or takes too long."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Failed(f"the server exited with {process.returncode}", log)
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)
    raise Failed(f"the server did not answer within {LIMIT_S} s", log)


def post(url: str, body: dict[str, Any], log: Path) -> dict[str, Any]:
    """Return the response to a JSON request. Raise Failed on an HTTP error or a timeout."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise Failed(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:500]}", log) from None
    except OSError as error:
        raise Failed(f"{url} did not answer ({error})", log) from None
