"""Encoding documents in parallel processes.

Batches come back in the order in which they were read, so the files made of them are the same bytes for any number of
workers. A worker imports this module, which therefore imports neither torch nor Megatron.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from moonlight.data.tokenizer import Tokenizer

_worker_tokenizer: Tokenizer | None = None


@dataclass
class Batch:
    """Documents to encode together."""

    raw: list[bytes] = field(default_factory=list)
    """UTF-8 text."""
    sources: list[int] = field(default_factory=list)
    """Index of each document's input."""
    position: int = 0
    """Bytes of all input files read once this batch is full."""


def _encode(tokenizer: Tokenizer, raw: list[bytes]) -> list[numpy.ndarray]:
    """Ids of each document with [EOS] after them, int32 [tokens]."""
    return [numpy.array([*tokenizer.encode(text.decode()), tokenizer.eos_id], numpy.int32) for text in raw]


def _encode_in_worker(raw: list[bytes]) -> list[numpy.ndarray]:
    assert _worker_tokenizer is not None
    return _encode(_worker_tokenizer, raw)


def _start_worker(tokenizer_folder: Path) -> None:
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer.load(tokenizer_folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle.
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    # A worker waits for work for ever, also when its parent was killed.
    threading.Thread(target=end_with_parent, daemon=True).start()


def encode_all(
    batches: Iterable[Batch], tokenizer: Tokenizer, tokenizer_folder: Path, workers: int
) -> Iterator[tuple[Batch, list[numpy.ndarray]]]:
    """Each batch with its documents' ids, in the order of `batches`; at most 3 a worker are in memory."""
    if workers == 1:
        for batch in batches:
            yield batch, _encode(tokenizer, batch.raw)
        return
    # spawn: a forked child of a process that has threads (torch starts some) may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer_folder,))
    waiting: deque[tuple[Batch, Future[list[numpy.ndarray]]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode_in_worker, batch.raw)))
            if len(waiting) >= 3 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
