"""torchrun's agent, mended for many nodes: `python -m pretrain.agent SECONDS --nnodes 4 ... -m pretrain RECIPE`.

What torch 2.13 gets wrong:

- It gives the processes one key-value store for all their starts, in which those that start again find addresses of the
  dead: `Gloo connectFullMesh failed`. With TORCH_DISABLE_SHARE_RDZV_TCP_STORE every start has a store of its own.
- When the link to the first node breaks, the agent waits for an answer of its store as long as the kernel lets it, more
  than four minutes, though the store's time-out is one. Here it ends when no process of its ran for SECONDS.
"""

import os
import sys
import threading
import time
from pathlib import Path

SECONDS_BETWEEN_LOOKS = 1.0


def main() -> None:
    """Run torchrun's command line; SECONDS must be longer than an agent may wait for the others to join."""
    seconds = float(sys.argv.pop(1))
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    threading.Thread(target=_end_when_idle, args=(seconds,), daemon=True).start()

    from torch.distributed.run import main as torchrun

    torchrun()


def _end_when_idle(seconds: float) -> None:
    seen = time.monotonic()
    while time.monotonic() - seen < seconds:
        if _has_children():
            seen = time.monotonic()
        time.sleep(SECONDS_BETWEEN_LOOKS)
    print(
        f"error: timed out: no process ran on this node for {seconds:.0f} s, its agent does not hear from the others; "
        "check the network between the nodes, then start the same command again",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # the main thread is inside the store's client


def _has_children() -> bool:
    """Whether a process that this one started runs; those that ended and were not waited for do not count."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        if int(parent) == os.getpid() and state != "Z":
            return True
    return False


if __name__ == "__main__":
    main()
