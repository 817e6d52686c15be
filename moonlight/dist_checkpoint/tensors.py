"""Write and read the tensors of a checkpoint with all ranks, in torch's distributed checkpoint format.

The files hold chunks of global tensors and an index of the chunks. When ranks read, they may hold other chunks than
those that were written. Writing has three phases: all ranks plan which rank writes which chunks, each rank writes a
file, and one rank writes the index from the file descriptions of all ranks. Only the first phase is collective.
"""

import contextlib
import dataclasses
import errno
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import get_crc32_options, set_crc32_options

from moonlight.dist_checkpoint.chunks import LazyTensor, LocalChunks
from moonlight.dist_checkpoint.direct_io import DirectFile
from moonlight.dist_checkpoint.index import (
    INDEX_FILE,
    IndexReader,
    global_shapes,
    is_covered,
    read_index,
    reraise_cause,
)
from moonlight.errors import UserError
from moonlight.files import fsync, xxh3_checksum

TENSOR_ALIGNMENT = 64
"""Alignment of every stored tensor, in bytes, so that it can be memory-mapped (`StoredTensors`)."""
TRANSPOSE_THREADS = 2
"""One thread transposes matrices at 2 GB/s, which is slower than a good disk."""
PIECE_BYTES = 4 << 20
"""Size of the pieces in which a matrix is transposed, in bytes."""
PIECES_AHEAD = 4
"""Maximum number of transposed pieces that wait to be written."""


@dataclass(frozen=True)
class WritePlan:
    """Which rank writes which chunks; the same for every save of a run."""

    local: SavePlan
    """Plan of this rank."""
    all_ranks: list[SavePlan]
    """Plans of all ranks, on rank 0; empty on the others."""
    metadata: Metadata | None
    """Index of the checkpoint without positions in files, on rank 0; None on the others."""


@dataclass(frozen=True)
class WrittenFile:
    """Description of the file that a rank wrote."""

    name: str
    bytes: int
    xxh3: str
    spans: list[tuple[int, int]]
    """Offset and length of each chunk in bytes, in the order of the rank's plan."""


def plan_save(state: Mapping[str, LocalChunks | LazyTensor]) -> WritePlan:
    """Assign the chunks that all ranks hold to the ranks; each replica is written once. Collective.

    Without a process group, this process holds and writes all chunks.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(state), None, _rank() == 0)
    local = planner.create_local_plan()
    gathered: list[Any] = [local] * _world_size()
    if dist.is_initialized():
        dist.gather_object(local, gathered if _rank() == 0 else None)
    plans: list[Any] = [None] * _world_size()
    index = None
    if _rank() == 0:
        plans, index = planner.create_global_plan(gathered)
        for key, entry in index.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata) and is_covered(entry), (
                f"{key}: no rank holds some of its elements"
            )
    scattered = [plans[0]]
    if dist.is_initialized():
        dist.scatter_object_list(scattered, plans)
    return WritePlan(scattered[0], plans if index else [], index)


def write_file(
    folder: Path,
    plan: SavePlan,
    get_values: Callable[[MetadataIndex], torch.Tensor],
    is_canceled: Callable[[], bool] = lambda: False,
) -> WrittenFile:
    """Write this rank's chunks to one file in `folder`, flushed to disk.

    The data is read once: the checksum is computed from the bytes that go to disk. Only tensors that are not contiguous
    in host memory are copied, a few megabytes at a time.

    Args:
        get_values: returns the values of a chunk of `plan`.
        is_canceled: called before each tensor; True stops the write.

    Raises:
        OSError: the file cannot be written, or `is_canceled` returned True; the file is deleted.
    """
    path = folder / f"__{_rank()}_0.distcp"
    spans = []
    try:
        with DirectFile(path) as raw, _without_crc32(), ThreadPoolExecutor(TRANSPOSE_THREADS) as pool:
            file, transposer = _HashedFile(raw), _Transposer(pool)
            for item in plan.items:
                if is_canceled():
                    raise InterruptedError(errno.EINTR, "canceled")
                file.write(bytes(-file.size % TENSOR_ALIGNMENT))
                start = file.size
                _write(get_values(item.index), file, transposer)
                spans.append((start, file.size - start))
            raw.sync()
    except BaseException:
        path.unlink(missing_ok=True)  # free space so the error can be logged
        raise
    return WrittenFile(path.name, file.size, file.digest.hexdigest(), spans)


def write_index(folder: Path, plan: WritePlan, written: list[WrittenFile]) -> dict[str, dict[str, Any]]:
    """Write the index of the files of all ranks. Only rank 0 calls it.

    Args:
        written: the files, in rank order.

    Returns:
        Size and checksum of these files and of the index, by name, as `state.json` holds them.
    """
    assert plan.metadata is not None
    storage = {
        item.index: _StorageInfo(file.name, *span)
        for rank_plan, file in zip(plan.all_ranks, written, strict=True)
        for item, span in zip(rank_plan.items, file.spans, strict=True)
    }
    results = [WriteResult(index, info.length, info) for index, info in storage.items()]
    # A copy, because torch modifies the metadata that it gets.
    _IndexWriter(folder).finish(dataclasses.replace(plan.metadata), [results])
    path = folder / INDEX_FILE
    fsync(path)
    files = {file.name: {"bytes": file.bytes, "xxh3": file.xxh3} for file in written}
    return files | {INDEX_FILE: {"bytes": path.stat().st_size, "xxh3": xxh3_checksum(path)}}


def save_tensors(folder: Path, state: Mapping[str, LocalChunks | LazyTensor]) -> dict[str, dict[str, Any]]:
    """Write the global tensors that all ranks hold into `folder`, one file a rank. Collective.

    Returns:
        Size and checksum of every file by name, on rank 0; an empty dict on the others.

    Raises:
        OSError: this rank cannot write; not raised on other ranks.
    """
    plan = plan_save(state)
    local_file = write_file(folder, plan.local, lambda index: state[index.fqn].__get_tensor_shard__(index))
    written: list[Any] = [local_file] * _world_size()
    if dist.is_initialized():
        dist.all_gather_object(written, local_file)
    return write_index(folder, plan, written) if _rank() == 0 else {}


class _IndexWriter(dcp.FileSystemWriter):
    """Torch's index writer, without the storage metadata: the index holds no path and no random number."""

    def storage_meta(self) -> None:
        return None


class _HashedFile:
    """File object for `torch.save` that updates size and checksum with every write."""

    def __init__(self, file: DirectFile) -> None:
        self._file, self.size, self.digest = file, 0, xxhash.xxh3_128()
        self.replacement: tuple[int, Iterator[memoryview]] | None = None
        """(address, pieces): the next write of memory at this address writes the pieces instead."""

    def write(self, data: Any) -> int:
        raw = memoryview(data)
        start = self.size
        pieces: Iterable[memoryview] = [raw]
        if self.replacement is not None and np.frombuffer(raw, np.uint8).ctypes.data == self.replacement[0]:
            pieces, self.replacement = self.replacement[1], None
        for piece in pieces:
            self._file.write(piece)
            self.digest.update(piece)
            self.size += piece.nbytes
        assert self.size - start == raw.nbytes
        return raw.nbytes

    def flush(self) -> None:
        """Do nothing; torch requires the method."""


@contextlib.contextmanager
def _without_crc32() -> Iterator[None]:
    """Omit the CRC32 that torch stores with each tensor and never compares; `state.json` has a checksum of the file."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def _write(values: torch.Tensor, file: _HashedFile, transposer: "_Transposer") -> None:
    """Append a tensor in row-major order; transpose it if it is not contiguous in host memory.

    `torch.save` needs a storage as large as the tensor. Allocating new memory costs more than transposing. So torch
    gets an allocation that is never touched, which has no physical memory, and the file writes the transposed pieces
    instead.
    """
    values = values.cpu()
    pieces = None if values.is_contiguous() else transposer.row_major_pieces(values)
    if pieces is None:
        raw = values.reshape(-1).view(torch.uint8).numpy()
    else:
        raw = np.empty(values.nbytes, np.uint8)
        file.replacement = raw.ctypes.data, pieces
    try:
        # A tensor made from the numpy array has its own storage, so torch.save writes only these bytes.
        torch.save(torch.from_numpy(raw).view(values.dtype).view(values.shape), file)  # type: ignore[arg-type]
    except RuntimeError as error:
        # On a full disk and on Ctrl-C, torch only reports an unexpected position in its archive.
        if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
            raise error.__context__ from None
        raise
    assert file.replacement is None


class _Transposer:
    """Copy tensors to row-major order, a few megabytes at a time; threads prepare the next pieces."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        # Reused: the first touch of new memory takes as long as transposing into it.
        self._buffers = [np.empty(0, np.uint8)] * (PIECES_AHEAD + 1)

    def row_major_pieces(self, values: torch.Tensor) -> Iterator[memoryview]:
        """Yield the bytes of a tensor; a piece is valid until the next one is requested.

        A stack is split into its matrices, because torch transposes matrices several times as fast as stacks of them.
        """
        pieces = values if values.dim() == 3 else values.split(max(1, PIECE_BYTES // values[0].nbytes))
        in_flight: deque[Future[memoryview]] = deque()
        for index, piece in enumerate(pieces):
            in_flight.append(self._pool.submit(self._transpose, piece, index % len(self._buffers)))
            if len(in_flight) == len(self._buffers):
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()

    def _transpose(self, piece: torch.Tensor, index: int) -> memoryview:
        if self._buffers[index].nbytes < piece.nbytes:
            self._buffers[index] = np.empty(piece.nbytes, np.uint8)
        raw = self._buffers[index][: piece.nbytes]
        torch.from_numpy(raw).view(piece.dtype).view(piece.shape).copy_(piece)
        return raw.data


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class _LoadPlanner(DefaultLoadPlanner):
    """Torch's planner, extended to `LocalChunks`; the original only finds chunks of tensors."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # Torch's method replaces every value of `state_dict` of an unknown type by None.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


def load_tensors(folder: Path, state: dict[str, LocalChunks], *, strict: bool = True) -> None:
    """Fill every chunk of `state` from the checkpoint in `folder`. Collective; each rank passes its local chunks.

    Args:
        strict: False accepts a checkpoint that holds more tensors, such as momenta.

    Raises:
        UserError: the checkpoint cannot be read, or names or shapes of its tensors differ from those of all ranks.
    """
    _check_names_and_shapes(folder, global_shapes(read_index(folder)), state, strict)
    planner = _LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with reraise_cause():
        dcp.load(state, storage_reader=IndexReader(folder), planner=planner)


def _check_names_and_shapes(
    folder: Path, stored: dict[str, tuple[int, ...]], state: dict[str, LocalChunks], strict: bool
) -> None:
    """Compare the global tensors of a checkpoint with those of all ranks; all ranks raise the same error."""
    shapes = {key: chunks.shape for key, chunks in state.items()}
    gathered = [shapes] * dist.get_world_size()
    dist.all_gather_object(gathered, shapes)
    expected = {key: shape for rank_shapes in gathered for key, shape in rank_shapes.items()}
    if missing := expected.keys() - stored.keys():
        raise UserError(
            f"checkpoint {folder} lacks {_names(missing)}, which the run needs: was a parameter frozen when it was "
            "saved, or added since? resume with the model and the optimizer of the checkpoint"
        )
    if strict and (unknown := stored.keys() - expected.keys()):
        raise UserError(
            f"checkpoint {folder} holds {_names(unknown)}, which the run does not have: was a parameter frozen or "
            "removed since it was saved? resume with the model and the optimizer of the checkpoint"
        )
    for key, shape in expected.items():
        if stored[key] != shape:
            raise UserError(f"checkpoint {folder} holds {key} with shape {stored[key]}, the run has {shape}")


def _names(keys: set[str]) -> str:
    """Return the first four of `keys` as text, and the number of the others."""
    first = sorted(keys)[:4]
    return ", ".join(first) + (f" and {len(keys) - len(first)} more" if len(keys) > len(first) else "")
