"""A checkpoint's index, which torch keeps as a pickle, and its tensors, read without letting them call anything."""

import contextlib
import io
import math
import os
import pickle
import struct
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from moonlight.dist_checkpoint.direct_io import read_direct
from moonlight.dist_checkpoint.state import CorruptCheckpointError

INDEX_FILE = ".metadata"

_METADATA = "torch.distributed.checkpoint.metadata"
_ACCEPTED = frozenset(
    {
        ("torch", "Size"),
        ("torch", "bfloat16"),
        ("torch", "float32"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "Metadata"),
        (_METADATA, "MetadataIndex"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "TensorStorageMetadata"),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
    }
)


# Torch says so whenever one process reads a checkpoint by itself, which is what this reader is for.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class _IndexUnpickler(pickle.Unpickler):
    """Builds the record classes of a torch checkpoint index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ACCEPTED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


def read_index(folder: Path) -> Metadata:
    """The index of the checkpoint in `folder`.

    Raises:
        CorruptCheckpointError: it is not an index, or it names code to run.
    """
    path = folder / INDEX_FILE
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except FileNotFoundError:
        raise CorruptCheckpointError(f"checkpoint {folder} is incomplete: {INDEX_FILE} is missing") from None
    except Exception as error:  # bytes that are no pickle can end an unpickler in any way
        raise CorruptCheckpointError(f"checkpoint index {path} is refused: {error or type(error).__name__}") from None
    if not isinstance(index, Metadata) or not isinstance(index.state_dict_metadata, dict):
        raise CorruptCheckpointError(f"checkpoint index {path} is refused: it is no index")
    for key, entry in index.state_dict_metadata.items():
        # Torch unpickles, without any restriction, what the index calls bytes instead of a tensor.
        if type(entry) is not TensorStorageMetadata:
            raise CorruptCheckpointError(f"checkpoint index {path} is refused: {key} is no tensor")
        if not is_covered(entry):
            raise CorruptCheckpointError(f"checkpoint index {path} is refused: parts of {key} are missing")
    return index


def global_shapes(index: Metadata) -> dict[str, tuple[int, ...]]:
    """The shape of every whole tensor of a checkpoint."""
    entries = index.state_dict_metadata.items()
    return {key: tuple(entry.size) for key, entry in entries if isinstance(entry, TensorStorageMetadata)}


def is_covered(entry: TensorStorageMetadata) -> bool:
    """Whether the rectangles of a tensor, which do not overlap, make up the whole of it."""
    return sum(math.prod(chunk.sizes) for chunk in entry.chunks) == math.prod(entry.size)


class StoredTensors:
    """The rectangles of a checkpoint, mapped from its files, or parts of them read past the page cache.

    Raises:
        CorruptCheckpointError: the index, or what it points to, is not what a checkpoint holds.
    """

    def __init__(self, folder: Path, index: Metadata | None = None) -> None:
        self._folder, self._index = folder, index or read_index(folder)
        self._rectangles: dict[str, dict[tuple[int, ...], tuple[int, ...]]] = {}
        self._places: dict[tuple[str, tuple[int, ...]], tuple[Path, int, int]] = {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every whole tensor."""
        return global_shapes(self._index)

    def dtype(self, key: str) -> torch.dtype:
        """What a tensor is stored in."""
        return self._entry(key).properties.dtype

    def chunks(self, key: str) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Offset -> sizes of the rectangles that make up a tensor."""
        if key not in self._rectangles:
            chunks = self._entry(key).chunks
            self._rectangles[key] = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in chunks}
        return self._rectangles[key]

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self._index.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)  # read_index accepts nothing else
        return entry

    def mmap_chunk(self, key: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """One rectangle, on the CPU, which takes no memory of its own until it is copied. Not to be written to."""
        path, start, nbytes = self._place(key, offset, sizes)
        raw = numpy.memmap(path, numpy.uint8, mode="c", offset=start, shape=(nbytes,))
        return torch.from_numpy(raw).view(self.dtype(key)).view(sizes)

    def read_chunk(
        self, key: str, offset: tuple[int, ...], sizes: tuple[int, ...], index: tuple[int | slice, ...]
    ) -> torch.Tensor:
        """`rectangle[index]` of one rectangle, in memory of its own, from the disk itself.

        Args:
            index: numbers, then slices with both ends, one for every axis.
        """
        path, start, _ = self._place(key, offset, sizes)
        dtype = self.dtype(key)
        rows_axis = next(axis for axis, where in enumerate(index) if isinstance(where, slice))
        rows = index[rows_axis]
        assert isinstance(rows, slice)
        first = 0
        for where, size in zip([*index[:rows_axis], rows.start], sizes, strict=False):
            first = first * size + where
        row_bytes = math.prod(sizes[rows_axis + 1 :]) * dtype.itemsize
        nbytes = (rows.stop - rows.start) * row_bytes
        raw = read_direct(path, start + first * row_bytes, nbytes)
        values = torch.from_numpy(raw).view(dtype).view(rows.stop - rows.start, *sizes[rows_axis + 1 :])
        return values[(slice(None), *index[rows_axis + 1 :])]

    def _place(self, key: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[Path, int, int]:
        """File, first byte and number of bytes of a rectangle."""
        if (key, offset) in self._places:
            return self._places[key, offset]
        dtype = self.dtype(key)
        try:
            place = self._index.storage_data[MetadataIndex(key, torch.Size(offset))]
            path = self._folder / place.relative_path
        except (KeyError, TypeError, AttributeError):
            raise CorruptCheckpointError(
                f"checkpoint {self._folder} is refused: its index has no place for {key}"
            ) from None
        if path.parent != self._folder:
            raise CorruptCheckpointError(
                f"checkpoint {self._folder} is refused: its index names a file outside ({path})"
            )
        nbytes = math.prod(sizes) * dtype.itemsize
        try:
            found = path, _values_begin(path, place.offset, place.length, nbytes), nbytes
            if sum(found[1:]) > path.stat().st_size:
                raise EOFError
        except (zipfile.BadZipFile, ValueError, EOFError, struct.error, NotImplementedError):
            raise CorruptCheckpointError(f"checkpoint file {path} is refused: {key} in it is no tensor") from None
        self._places[key, offset] = found
        return found


def _values_begin(path: Path, offset: int, length: int, nbytes: int) -> int:
    """Where the values of a tensor begin that `torch.save` wrote at `offset`: an archive that is not compressed.

    What else is in the archive, a pickle, stays unread.
    """
    with path.open("rb") as file:
        with zipfile.ZipFile(_Window(file, offset, length)) as archive:
            (values,) = [entry for entry in archive.infolist() if entry.filename.partition("/")[2].startswith("data/")]
        if values.compress_type != zipfile.ZIP_STORED or values.file_size != nbytes:
            raise ValueError
        file.seek(offset + values.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
        return offset + values.header_offset + 30 + name_length + extra_length


class _Window(io.RawIOBase):
    """`length` bytes of a file as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = (0, self._at, self._length)[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        read = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._at)])  # type: ignore[attr-defined]
        self._at += read
        return read


class IndexReader(FileSystemReader):
    """Torch's reader, with the index read by `read_index`, and rectangles that no pickle is needed for."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_index(Path(self.path))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        stored = StoredTensors(Path(self.path))
        sizes = {
            (key, offset): sizes
            for key in {item.storage_index.fqn for item in plan.items}
            for offset, sizes in stored.chunks(key).items()
        }
        wanted: dict[tuple[str, tuple[int, ...]], list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            assert item.storage_index.offset is not None
            wanted[item.storage_index.fqn, tuple(item.storage_index.offset)].append(item)
        for (key, offset), items in wanted.items():
            values = stored.mmap_chunk(key, offset, sizes[key, offset])
            for item in items:
                target = planner.resolve_tensor(item)
                target.copy_(narrow_tensor_by_index(values, item.storage_offsets, item.lengths))
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


@contextlib.contextmanager
def cause_raised() -> Iterator[None]:
    """Raise the error that stopped torch's distributed checkpoint, in place of its collection of all ranks' errors."""
    try:
        yield
    except CheckpointException as error:
        if not error.failures:
            raise
        cause, _ = next(iter(error.failures.values()))
        raise cause from error
