"""Safetensors files written tensor by tensor: none of them is in memory as a whole.

The format (8 bytes of header length, a JSON header, the values) is that of https://github.com/huggingface/safetensors,
whose own writer wants all tensors of a file at once.
"""

import contextlib
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moonlight.dist_checkpoint.direct_io import DirectFile
from moonlight.dist_checkpoint.hf_mapping import HFTensor, TensorMapping, slice_rows

CHUNK_BYTES = 1 << 20
"""Rounded, hashed and copied at once: as much as a processor's cache holds."""
READ_BYTES = 8 << 20
"""Read at once, of a tensor in bfloat16."""

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class ShardEntry:
    """One tensor of a file."""

    row: TensorMapping
    part: HFTensor
    dtype: torch.dtype

    def row_slices(self) -> Iterator["ShardEntry"]:
        """Its rows, a few at a time."""
        step = max(1, READ_BYTES // (self.nbytes // self.part.shape[0]))
        for begin in range(0, self.part.shape[0], step):
            end = min(begin + step, self.part.shape[0])
            yield replace(self, part=slice_rows(self.part, begin, end))

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.part.shape).numel() * self.dtype.itemsize


def plan_shards(rows: Sequence[TensorMapping], dtype: torch.dtype, max_bytes: int) -> list[list[ShardEntry]]:
    """The tensors in order, cut where a file would outgrow `max_bytes`; router biases stay float32.

    Within a file the wider dtype comes first, so that every tensor is aligned.
    """
    shards: list[list[ShardEntry]] = [[]]
    size = 0
    for row in rows:
        for part in row.hf_tensors:
            entry = ShardEntry(row, part, torch.float32 if part.init_kind == "bias" else dtype)
            if shards[-1] and size + entry.nbytes > max_bytes:
                shards.append([])
                size = 0
            shards[-1].append(entry)
            size += entry.nbytes
    return [sorted(shard, key=lambda entry: -entry.dtype.itemsize) for shard in shards]


def write_shard(
    path: Path, entries: Sequence[ShardEntry], read: Callable[[ShardEntry], torch.Tensor], done: Callable[[int], None]
) -> str:
    """Write one file; whoever owns its folder flushes it to the disk. What comes next is read in the meantime.

    Args:
        read: values of some rows of a tensor, in any dtype and stride.
        done: is told the bytes of what was written each time.

    Returns:
        The SHA-256 of the file.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for entry in entries:
        end = begin + entry.nbytes
        header[entry.part.name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.part.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with DirectFile(path) as file, _one_thread():
        for raw in (len(text).to_bytes(8, "little"), text):
            digest.update(raw)
            file.write(memoryview(raw))
        runs = (run for entry in entries for run in entry.row_slices())
        for run, values in _read_ahead(runs, read):
            assert tuple(values.shape) == run.part.shape, (run.part.name, values.shape)
            for rows in _rows(values, run.dtype):
                values_raw = rows.flatten().view(torch.uint8).numpy().data
                digest.update(values_raw)
                file.write(values_raw)
            done(run.nbytes)
    return digest.hexdigest()


def _read_ahead(
    runs: Iterable[ShardEntry], read: Callable[[ShardEntry], torch.Tensor]
) -> Iterator[tuple[ShardEntry, torch.Tensor]]:
    """Each with its values, while a thread reads those of the next."""
    with ThreadPoolExecutor(1) as pool:
        under_way: deque[tuple[ShardEntry, Future[torch.Tensor]]] = deque()
        for run in runs:
            under_way.append((run, pool.submit(read, run)))
            if len(under_way) == 2:
                first, values = under_way.popleft()
                yield first, values.result()
        for last, values in under_way:
            yield last, values.result()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Pieces as small as a cache are turned and rounded quickest by one thread; others would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _rows(values: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Runs of rows, row after row in memory, as small as the processor's cache."""
    step = max(1, CHUNK_BYTES // (values[0].numel() * dtype.itemsize))
    for start in range(0, len(values), step):
        yield values[start : start + step].to(dtype).contiguous()
