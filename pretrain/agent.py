"""torchrun's agent, mended for many nodes: `python -m pretrain.agent SECONDS --nnodes 4 ... -m pretrain RECIPE`.

What torch 2.13 gets wrong:

- It gives the processes one key-value store for all their starts, in which those that start again find addresses of the
  dead: `Gloo connectFullMesh failed`. With TORCH_DISABLE_SHARE_RDZV_TCP_STORE every start has a store of its own.
- When the link to the first node breaks, the agent waits for an answer of its store as long as the kernel lets it, more
  than four minutes, though the store's time-out is one. Here it ends when no process of its ran for SECONDS.
- SIGUSR1 would end it. Here one of its processes gets the signal, all save, and go on.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

SECONDS_BETWEEN_LOOKS = 1.0


def main() -> None:
    """Run torchrun's command line; SECONDS must be longer than an agent may wait for the others to join."""
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        return
    try:
        seconds = float(sys.argv.pop(1))
    except (IndexError, ValueError):
        seconds = 0.0
    if not seconds > 0:
        usage = "python -m pretrain.agent SECONDS --nnodes 4 --nproc-per-node 8 ... -m pretrain RECIPE"
        sys.exit(_ended(f"error: SECONDS, after which an agent without processes ends, is not above 0: {usage}", 2))
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    threading.Thread(target=_end_when_idle, args=(seconds,), daemon=True).start()
    signal.signal(signal.SIGUSR1, lambda *_: _pass_on(signal.SIGUSR1))

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun()
    except SignalException as stopped:
        sys.exit(_ended(f"{socket.gethostname()}: stopped by {stopped.sigval.name}", 1))
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        text = (
            f"error: {socket.gethostname()}: process {rank} ended with code {failure.exitcode}: see what it said above"
        )
        sys.exit(_ended(text, 1))


def _ended(text: str, code: int) -> int:
    print(text, file=sys.stderr, flush=True)
    return code


def _end_when_idle(seconds: float) -> None:
    seen = time.monotonic()
    while time.monotonic() - seen < seconds:
        if any(_children()):
            seen = time.monotonic()
        time.sleep(SECONDS_BETWEEN_LOOKS)
    print(
        f"error: timed out: no process ran on this node for {seconds:.0f} s, its agent does not hear from the others; "
        "check the network between the nodes, then start the same command again",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # the main thread is inside the store's client


def _pass_on(number: signal.Signals) -> None:
    """Send a signal to the first process that has made up its mind about it; it would end one that is just starting."""
    for child in _children():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            status = dict(line.split(":", 1) for line in (child / "status").read_text().splitlines())
            if (int(status["SigCgt"], 16) | int(status["SigIgn"], 16)) >> (number - 1) & 1:
                os.kill(int(child.name), number)
                return


def _children() -> Iterator[Path]:
    """Folders in /proc of the processes that this one started; zombies do not count."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        if int(parent) == os.getpid() and state != "Z":
            yield stat.parent


if __name__ == "__main__":
    main()
