"""torchrun's agent with fixes for many nodes: `python -m pretrain.agent SECONDS --nnodes 4 ... -m pretrain RECIPE`.

Problems of torchrun in torch 2.13.0 that this agent fixes, and when each fix can be deleted:

- One key-value store for all restarts. Restarted processes find addresses of dead processes in it and fail with
  `Gloo connectFullMesh failed`. TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives every restart its own store.
  Delete when `DynamicRendezvousHandler.next_rendezvous` by default builds its `_bootstrap_store_info` in every round.
- When the link to the first node breaks, the agent waits for its store as long as the kernel's TCP time-out, more than
  four minutes, although the store's read_timeout is 60 s. With the fix, the agent exits after SECONDS in which none of
  its processes ran. Delete when a store operation of the agent fails within read_timeout after the link breaks.
- SIGUSR1 ends the agent. With `--signals-to-handle` the agent catches it, but then stops its processes. With the fix,
  the agent forwards the signal to one process; all processes save and continue.
  Delete when torchrun can forward a signal without stopping its processes.
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

POLL_SECONDS = 1.0


def main() -> None:
    """Run torchrun's command line; SECONDS must be longer than the rendezvous join timeout."""
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        return
    try:
        seconds = float(sys.argv.pop(1))
    except (IndexError, ValueError):
        seconds = 0.0
    if not seconds > 0:
        usage = "python -m pretrain.agent SECONDS --nnodes 4 --nproc-per-node 8 ... -m pretrain RECIPE"
        print(f"error: SECONDS, the idle time after which the agent exits, must be above 0: {usage}", file=sys.stderr)
        sys.exit(2)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    threading.Thread(target=_exit_when_idle, args=(seconds,), daemon=True).start()
    signal.signal(signal.SIGUSR1, lambda *_: _forward(signal.SIGUSR1))

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun()
    except SignalException as error:
        sys.exit(f"{socket.gethostname()}: stopped by {error.sigval.name}")
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.exit(f"error: {socket.gethostname()}: process {rank} exited with code {failure.exitcode}, see above")


def _exit_when_idle(seconds: float) -> None:
    """Exit if this process has had no child process for `seconds`; runs in a thread."""
    last_seen = time.monotonic()
    while time.monotonic() - last_seen < seconds:
        if any(_children()):
            last_seen = time.monotonic()
        time.sleep(POLL_SECONDS)
    print(
        f"error: timed out: no process ran on this node for {seconds:.0f} s, its agent cannot reach the others; "
        "check the network between the nodes, then rerun the command",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # the main thread is inside the store's client


def _forward(signal_number: signal.Signals) -> None:
    """Send a signal to the first child that handles or ignores it.

    A child that is just starting does neither, and the signal would end it.
    """
    for child in _children():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has exited
            status = dict(line.split(":", 1) for line in (child / "status").read_text().splitlines())
            if (int(status["SigCgt"], 16) | int(status["SigIgn"], 16)) >> (signal_number - 1) & 1:
                os.kill(int(child.name), signal_number)
                return


def _children() -> Iterator[Path]:
    """Yield the folders in /proc of the child processes of this process, except zombies."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):  # it has exited
            continue
        if int(parent) == os.getpid() and state != "Z":
            yield stat.parent


if __name__ == "__main__":
    main()
