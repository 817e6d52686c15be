"""Persistent worker processes for tests of several ranks.

Starting a process costs seconds of imports, so the workers persist and only their process groups change between calls.
"""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

NUM_WORKERS = 4
TIMEOUT_S = 240


def _serve(pipe: Connection) -> None:
    """Run calls until the pipe closes. Each call creates its process group, answers, and destroys the group."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from moonlight import parallel

    while True:
        try:
            rank, world_size, rendezvous, function, args = pipe.recv()
        except EOFError:
            return
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ[parallel.RENDEZVOUS_FILE] = rendezvous
        try:
            parallel.init_distributed(threads=1, timeout=timedelta(seconds=60))
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        finally:
            parallel.destroy_distributed()
        pipe.send(answer)


class Pool:
    """`Pool.run(n, function, *args)` calls a module-level function on n ranks and returns their answers in order."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(NUM_WORKERS):
            parent_end, worker_end = context.Pipe()
            process = context.Process(target=_serve, args=(worker_end,), daemon=True)
            process.start()
            worker_end.close()
            self.pipes.append(parent_end)
            self.processes.append(process)

    def run(self, world_size: int, function: Callable, *args: Any) -> list[Any]:
        """Return the answers of ranks 0 to world_size - 1; raise the exception of any rank with its traceback."""
        with tempfile.TemporaryDirectory() as folder:
            rendezvous = str(Path(folder) / "rendezvous")
            for rank, pipe in enumerate(self.pipes[:world_size]):
                pipe.send((rank, world_size, rendezvous, function, args))
            answers = []
            for rank, pipe in enumerate(self.pipes[:world_size]):
                if not pipe.poll(TIMEOUT_S):
                    raise TimeoutError(f"rank {rank} of {world_size} did not answer {function.__name__}")
                answers.append(pipe.recv())
        for rank, (succeeded, answer) in enumerate(answers):
            if not succeeded:
                raise RuntimeError(f"rank {rank} of {world_size}:\n{answer}")
        return [answer for _, answer in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(timeout=10)
            process.kill()
