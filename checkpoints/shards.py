"""Writer of safetensors files, tensor by tensor: no file is in memory in full.

The format is 8 bytes of header length, a JSON header, then the values: https://github.com/huggingface/safetensors. The
writer of that library needs all tensors of a file in memory.
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
"""Bytes that are rounded, hashed and copied together; they fit into the processor's cache."""
READ_BYTES = 8 << 20
"""Bytes of a tensor that are read together, counted in the dtype of the file."""

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class ShardEntry:
    """One tensor of a file, or a slice of its rows, and the dtype that is written."""

    mapping: TensorMapping
    hf_tensor: HFTensor
    dtype: torch.dtype

    def row_slices(self) -> Iterator["ShardEntry"]:
        """Yield slices of the rows, of about READ_BYTES each."""
        num_rows = self.hf_tensor.shape[0]
        step = max(1, READ_BYTES // (self.nbytes // num_rows))
        for start in range(0, num_rows, step):
            yield replace(self, hf_tensor=slice_rows(self.hf_tensor, start, min(start + step, num_rows)))

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes, in the dtype of the file."""
        return torch.Size(self.hf_tensor.shape).numel() * self.dtype.itemsize


def plan_shards(mappings: Sequence[TensorMapping], dtype: torch.dtype, max_bytes: int) -> list[list[ShardEntry]]:
    """Assign the tensors, in order, to files of at most `max_bytes` bytes; router biases stay float32.

    A tensor larger than `max_bytes` gets a file of its own. Within a file the wider dtype is first, so that every
    tensor is aligned.
    """
    shards: list[list[ShardEntry]] = [[]]
    size = 0
    for mapping in mappings:
        for hf_tensor in mapping.hf_tensors:
            entry = ShardEntry(mapping, hf_tensor, torch.float32 if hf_tensor.init_kind == "bias" else dtype)
            if shards[-1] and size + entry.nbytes > max_bytes:
                shards.append([])
                size = 0
            shards[-1].append(entry)
            size += entry.nbytes
    return [sorted(shard, key=lambda entry: -entry.dtype.itemsize) for shard in shards]


def write_shard(
    path: Path,
    entries: Sequence[ShardEntry],
    read: Callable[[ShardEntry], torch.Tensor],
    report_written: Callable[[int], None],
) -> str:
    """Write one file, while a thread reads the next slice. The caller flushes the folder to the disk.

    Args:
        read: returns the values of a row slice, in any dtype and stride.
        report_written: gets the bytes of each slice, in the dtype of the file.

    Returns:
        SHA-256 of the file, as hexadecimal digits.

    Raises:
        OSError: the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        stop = start + entry.nbytes
        header[entry.hf_tensor.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.hf_tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with DirectFile(path) as file, _one_thread():
        for raw in (len(text).to_bytes(8, "little"), text):
            digest.update(raw)
            file.write(memoryview(raw))
        slices = (row_slice for entry in entries for row_slice in entry.row_slices())
        for row_slice, values in _read_ahead(slices, read):
            hf_tensor = row_slice.hf_tensor
            assert tuple(values.shape) == hf_tensor.shape, (hf_tensor.name, values.shape)
            for rows in values.split(max(1, CHUNK_BYTES // (values[0].numel() * row_slice.dtype.itemsize))):
                contiguous = rows.to(row_slice.dtype).contiguous()
                values_raw = contiguous.flatten().view(torch.uint8).numpy().data
                digest.update(values_raw)
                file.write(values_raw)
            report_written(row_slice.nbytes)
    return digest.hexdigest()


def _read_ahead(
    slices: Iterable[ShardEntry], read: Callable[[ShardEntry], torch.Tensor]
) -> Iterator[tuple[ShardEntry, torch.Tensor]]:
    """Yield each slice with its values, while a thread reads the next slice."""
    with ThreadPoolExecutor(1) as pool:
        in_flight: deque[tuple[ShardEntry, Future[torch.Tensor]]] = deque()
        for row_slice in slices:
            in_flight.append((row_slice, pool.submit(read, row_slice)))
            if len(in_flight) == 2:
                first, values = in_flight.popleft()
                yield first, values.result()
        for last, values in in_flight:
            yield last, values.result()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Limit torch to one thread: it transposes and rounds chunks of cache size fastest, without thread overhead."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
