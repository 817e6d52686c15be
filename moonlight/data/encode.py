"""Encode documents in parallel processes.

Batches return in the order in which they were read, so output files are byte-identical for any number of workers. A
worker process imports this module, which therefore imports neither torch nor Megatron.
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
"""Function from UTF-8 texts to one result per text. It is pickled and sent to the workers."""

_worker_encoder: Encoder | None = None


@dataclass
class DocumentBatch:
    """Documents to encode together."""

    raw: list[bytes] = field(default_factory=list)
    """UTF-8 text."""
    sources: list[int] = field(default_factory=list)
    """Index of each document's input in the list of inputs."""
    locations: list[tuple[Path, int]] = field(default_factory=list)
    """File and line of each document."""
    position: int = 0
    """Bytes of all input files read up to the end of this batch; for progress only."""


class TextEncoder:
    """Encoder of documents for worker processes: the ids of each document and [EOS], int32 [tokens]."""

    def __init__(self, tokenizer_folder: Path) -> None:
        self._folder, self.tokenizer = tokenizer_folder, Tokenizer.load(tokenizer_folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return TextEncoder, (self._folder,)  # each worker loads the tokenizer

    def __call__(self, raw: list[bytes]) -> list[numpy.ndarray]:
        tokenizer = self.tokenizer
        return [numpy.array([*tokenizer.encode(text.decode()), tokenizer.eos_id], numpy.int32) for text in raw]


def _encode_in_worker(raw: list[bytes]) -> list[Any]:
    assert _worker_encoder is not None
    return _worker_encoder(raw)


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the parent handles Ctrl-C
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    # Without this thread, a worker waits for work forever after its parent was killed.
    threading.Thread(target=exit_with_parent, daemon=True).start()


def encode_all(
    batches: Iterable[DocumentBatch], encoder: Encoder, workers: int
) -> Iterator[tuple[DocumentBatch, list[Any]]]:
    """Yield each batch with the result of `encoder` for its documents, in the order of `batches`.

    At most 3 batches per worker are in memory. With `workers` 1, this process encodes.
    """
    if workers == 1:
        for batch in batches:
            yield batch, encoder(batch.raw)
        return
    # Use spawn: a forked child of a process with threads (torch starts some) can hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (encoder,))
    pending: deque[tuple[DocumentBatch, Future[list[Any]]]] = deque()
    try:
        for batch in batches:
            pending.append((batch, pool.submit(_encode_in_worker, batch.raw)))
            if len(pending) >= 3 * workers:
                encoded_batch, future = pending.popleft()
                yield encoded_batch, future.result()
        for encoded_batch, future in pending:
            yield encoded_batch, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
