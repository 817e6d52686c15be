"""Encoding documents in parallel processes.

Batches come back in the order in which they were read, so the files made of them are the same bytes for any number of
workers. A worker imports this module, which therefore imports neither torch nor Megatron.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from moonlight.data.tokenizer import Tokenizer

Encoder = Callable[[list[bytes]], list[Any]]
"""Makes of each UTF-8 text what is to be written of it. Goes to workers by pickle."""

_worker_encoder: Encoder | None = None


@dataclass
class DocumentBatch:
    """Documents to encode together."""

    raw: list[bytes] = field(default_factory=list)
    """UTF-8 text."""
    sources: list[int] = field(default_factory=list)
    """Index of each document's input."""
    places: list[tuple[Path, int]] = field(default_factory=list)
    """File and line of each document."""
    position: int = 0
    """Bytes of all input files read once this batch is full."""


class TextEncoder:
    """Ids of each document with [EOS] after them, int32 [tokens]."""

    def __init__(self, tokenizer_folder: Path) -> None:
        self._folder, self.tokenizer = tokenizer_folder, Tokenizer.load(tokenizer_folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return TextEncoder, (self._folder,)  # a worker loads the tokenizer for itself

    def __call__(self, raw: list[bytes]) -> list[numpy.ndarray]:
        tokenizer = self.tokenizer
        return [numpy.array([*tokenizer.encode(text.decode()), tokenizer.eos_id], numpy.int32) for text in raw]


def _encode_in_worker(raw: list[bytes]) -> list[Any]:
    assert _worker_encoder is not None
    return _worker_encoder(raw)


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle.
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    # A worker waits for work for ever, also when its parent was killed.
    threading.Thread(target=end_with_parent, daemon=True).start()


def encode_all(
    batches: Iterable[DocumentBatch], encoder: Encoder, workers: int
) -> Iterator[tuple[DocumentBatch, list[Any]]]:
    """Each batch with what `encoder` makes of it, in the order of `batches`; at most 3 a worker are in memory."""
    if workers == 1:
        for batch in batches:
            yield batch, encoder(batch.raw)
        return
    # spawn: a forked child of a process that has threads (torch starts some) may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (encoder,))
    waiting: deque[tuple[DocumentBatch, Future[list[Any]]]] = deque()
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
