"""The tensors of a checkpoint, written and read by all ranks in torch's distributed checkpoint format.

What is on the disk is rectangles of whole tensors, and an index of them. Ranks may hold other rectangles when they read
than those that were written. Writing has three parts, so that only the first needs all ranks at the same time: a plan
of who writes what, a file by each rank, and the index, which one rank makes from what all say of their files.
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
    reraise_cause,
    global_shapes,
    is_covered,
    read_index,
)
from moonlight.errors import UserError
from moonlight.files import fsync, xxh3_checksum

TENSOR_ALIGNMENT = 64
"""Of every stored tensor, so that it can be used where it lies (`StoredTensors`)."""
TURNING_THREADS = 2
"""One turns matrices at 2 GB/s, which is slower than a good disk."""
PIECE_BYTES = 4 << 20
PIECES_AHEAD = 4
"""Turned matrices, or pieces of one, that wait for those before them to be written."""


@dataclass(frozen=True)
class WritePlan:
    """Who writes which rectangles; the same for every save of a run."""

    local: SavePlan
    all_ranks: list[SavePlan]
    """Those of all ranks, on rank 0."""
    metadata: Metadata | None
    """Of the whole checkpoint, but for the places in its files; on rank 0."""


@dataclass(frozen=True)
class WrittenFile:
    """What a rank says of the file that it wrote."""

    name: str
    bytes: int
    xxh3: str
    spans: list[tuple[int, int]]
    """Offset and length in bytes of each rectangle, in the order of the rank's plan."""


def plan_save(state: Mapping[str, LocalChunks | LazyTensor]) -> WritePlan:
    """Share out the rectangles that all ranks hold together; what several hold, one writes. All ranks call it.

    Without a process group this process holds all of them.
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
            assert isinstance(entry, TensorStorageMetadata) and is_covered(entry), f"{key}: elements that no rank holds"
    mine = [plans[0]]
    if dist.is_initialized():
        dist.scatter_object_list(mine, plans)
    return WritePlan(mine[0], plans if index else [], index)


def write_file(
    folder: Path,
    plan: SavePlan,
    values_at: Callable[[MetadataIndex], torch.Tensor],
    stopped: Callable[[], bool] = lambda: False,
) -> WrittenFile:
    """Write this rank's rectangles to a file of its own in `folder`, flushed to the disk.

    Its checksum is made on the way, of what goes to the disk. There is one pass over the data, and no copy but, a few
    megabytes at a time, of what does not lie row after row in host memory.

    Args:
        stopped: is asked before each tensor; True ends the work.

    Raises:
        OSError: it cannot be written, or `stopped` said so; there is no file then.
    """
    path = folder / f"__{_rank()}_0.distcp"
    places = []
    try:
        with DirectFile(path) as raw, _without_crc32(), ThreadPoolExecutor(TURNING_THREADS) as pool:
            file, turner = _Hashed(raw), _Transposer(pool)
            for item in plan.items:
                if stopped():
                    raise InterruptedError(errno.EINTR, "given up")
                file.write(bytes(-file.size % TENSOR_ALIGNMENT))
                begin = file.size
                _write(values_at(item.index), file, turner)
                places.append((begin, file.size - begin))
            raw.sync()
    except BaseException:
        path.unlink(missing_ok=True)  # so that there is room to say so
        raise
    return WrittenFile(path.name, file.size, file.digest.hexdigest(), places)


def write_index(folder: Path, plan: WritePlan, written: list[WrittenFile]) -> dict[str, dict[str, Any]]:
    """Write the index of the files that all ranks wrote, from rank 0 on; by rank 0.

    Returns:
        Size and checksum by name of these files and of the index: what `state.json` says of them.
    """
    assert plan.metadata is not None
    storage = {
        item.index: _StorageInfo(file.name, *place)
        for of_rank, file in zip(plan.all_ranks, written, strict=True)
        for item, place in zip(of_rank.items, file.spans, strict=True)
    }
    results = [WriteResult(index, place.length, place) for index, place in storage.items()]
    # A copy, because torch completes the index that it is given.
    _IndexWriter(folder).finish(dataclasses.replace(plan.metadata), [results])
    path = folder / INDEX_FILE
    fsync(path)
    files = {file.name: {"bytes": file.bytes, "xxh3": file.xxh3} for file in written}
    return files | {INDEX_FILE: {"bytes": path.stat().st_size, "xxh3": xxh3_checksum(path)}}


def save_tensors(folder: Path, state: Mapping[str, LocalChunks | LazyTensor]) -> dict[str, dict[str, Any]]:
    """Write the whole tensors that all ranks hold together into `folder`, each rank a file of its own.

    Returns:
        Size and checksum of every file by its name, on rank 0; nothing on the others.

    Raises:
        OSError: on the rank that cannot write.
    """
    plan = plan_save(state)
    own = write_file(folder, plan.local, lambda index: state[index.fqn].__get_tensor_shard__(index))
    written: list[Any] = [own] * _world_size()
    if dist.is_initialized():
        dist.all_gather_object(written, own)
    return write_index(folder, plan, written) if _rank() == 0 else {}


class _IndexWriter(dcp.FileSystemWriter):
    """Torch's writer of the index, which depends on the checkpoint alone: no path and no random number in it."""

    def storage_meta(self) -> None:
        return None


class _Hashed:
    """A file as `torch.save` writes to one; its size and checksum grow with it."""

    def __init__(self, file: DirectFile) -> None:
        self._file, self.size, self.digest = file, 0, xxhash.xxh3_128()
        self.instead: tuple[int, Iterator[memoryview]] | None = None
        """What is to be written in place of the memory at an address."""

    def write(self, data: Any) -> int:
        raw = memoryview(data)
        begin = self.size
        pieces: Iterable[memoryview] = [raw]
        if self.instead is not None and np.frombuffer(raw, np.uint8).ctypes.data == self.instead[0]:
            pieces, self.instead = self.instead[1], None
        for piece in pieces:
            self._file.write(piece)
            self.digest.update(piece)
            self.size += piece.nbytes
        assert self.size - begin == raw.nbytes
        return raw.nbytes

    def flush(self) -> None:
        """As torch asks of a file."""


@contextlib.contextmanager
def _without_crc32() -> Iterator[None]:
    """Leave out the checksum that torch puts beside each tensor and never compares; the whole file has a better one."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def _write(values: torch.Tensor, file: _Hashed, turner: "_Transposer") -> None:
    """Append a tensor; what does not lie row after row in host memory is turned on the way.

    Torch wants a storage as large as the tensor. New memory costs more than turning, so it gets one that nothing is
    ever written to (the system has no memory behind that), and the file gets the turned pieces in its place.
    """
    values = values.cpu()
    turned = None if values.is_contiguous() else turner.row_major_pieces(values)
    if turned is None:
        raw = values.reshape(-1).view(torch.uint8).numpy()
    else:
        raw = np.empty(values.nbytes, np.uint8)
        file.instead = raw.ctypes.data, turned
    try:
        # Through numpy, it is a storage of its own, of which torch.save writes no more than this.
        torch.save(torch.from_numpy(raw).view(values.dtype).view(values.shape), file)  # type: ignore[arg-type]
    except RuntimeError as error:
        # Of a disk that takes no more, and of Ctrl-C, torch only says that its archive is not where it should be.
        if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
            raise error.__context__ from None
        raise
    assert file.instead is None


class _Transposer:
    """Puts tensors that lie otherwise row after row, a few megabytes at a time, the next ones in the meantime."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        # Used again and again: the first touch of new memory takes as long as turning what goes there.
        self._memory = [np.empty(0, np.uint8)] * (PIECES_AHEAD + 1)

    def row_major_pieces(self, values: torch.Tensor) -> Iterator[memoryview]:
        """The bytes of a tensor; each piece holds until the next one is asked for.

        Matrix by matrix, because torch turns matrices several times as fast as stacks of them.
        """
        parts = values if values.dim() == 3 else values.split(max(1, PIECE_BYTES // values[0].nbytes))
        under_way: deque[Future[memoryview]] = deque()
        for index, part in enumerate(parts):
            under_way.append(self._pool.submit(self._turn, part, index % len(self._memory)))
            if len(under_way) == len(self._memory):
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()

    def _turn(self, part: torch.Tensor, place: int) -> memoryview:
        if self._memory[place].nbytes < part.nbytes:
            self._memory[place] = np.empty(part.nbytes, np.uint8)
        raw = self._memory[place][: part.nbytes]
        torch.from_numpy(raw).view(part.dtype).view(part.shape).copy_(part)
        return raw.data


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class _LoadPlanner(DefaultLoadPlanner):
    """Torch's planner, which by itself looks for rectangles in tensors only."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # Torch's own replaces everything in `state_dict` that it does not know by None.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


def load_tensors(folder: Path, state: dict[str, LocalChunks], *, strict: bool = True) -> None:
    """Fill every rectangle of `state` from the checkpoint in `folder`. All ranks call it, each with its own part.

    Args:
        strict: False accepts a checkpoint that holds more, such as momenta.

    Raises:
        UserError: the checkpoint cannot be read, or the tensors of all ranks together are not those it holds.
    """
    _check_names_and_shapes(folder, global_shapes(read_index(folder)), state, strict)
    planner = _LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with reraise_cause():
        dcp.load(state, storage_reader=IndexReader(folder), planner=planner)


def _check_names_and_shapes(
    folder: Path, there: dict[str, tuple[int, ...]], state: dict[str, LocalChunks], strict: bool
) -> None:
    """Compare the whole tensors of a checkpoint with those of all ranks together; every rank raises the same."""
    shapes = {key: held.shape for key, held in state.items()}
    of_ranks = [shapes] * dist.get_world_size()
    dist.all_gather_object(of_ranks, shapes)
    wanted = {key: shape for of_rank in of_ranks for key, shape in of_rank.items()}
    if missing := wanted.keys() - there.keys():
        raise UserError(
            f"checkpoint {folder} lacks {_names(missing)}, which the run needs: was a parameter frozen when it was "
            "saved, or added since? continue it with the model and the optimizer that it was saved from"
        )
    if strict and (unknown := there.keys() - wanted.keys()):
        raise UserError(
            f"checkpoint {folder} holds {_names(unknown)}, which the run does not have: was a parameter frozen or "
            "removed since it was saved? continue it with the model and the optimizer that it was saved from"
        )
    for key, shape in wanted.items():
        if there[key] != shape:
            raise UserError(f"checkpoint {folder} holds {key} with shape {there[key]}, the run has {shape}")


def _names(keys: set[str]) -> str:
    """The first few of `keys`, and how many more there are."""
    first = sorted(keys)[:4]
    return ", ".join(first) + (f" and {len(keys) - len(first)} more" if len(keys) > len(first) else "")
