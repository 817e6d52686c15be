"""Read a checkpoint's index, which torch stores as a pickle, and its tensors, without running code from the files."""

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


# Torch warns when one process reads a checkpoint without a process group, which is a use of this reader.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class _IndexUnpickler(pickle.Unpickler):
    """Unpickle the record classes of a torch checkpoint index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ACCEPTED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in an index")


def read_index(folder: Path) -> Metadata:
    """Return the index of the checkpoint in `folder`.

    Raises:
        CorruptCheckpointError: the file is missing, is not an index, or names code to run.
    """
    path = folder / INDEX_FILE
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except FileNotFoundError:
        raise CorruptCheckpointError(f"checkpoint {folder} is incomplete: {INDEX_FILE} is missing") from None
    except Exception as error:  # an unpickler can raise any exception on bytes that are not a pickle
        raise CorruptCheckpointError(f"checkpoint index {path} is invalid: {error or type(error).__name__}") from None
    if not isinstance(index, Metadata) or not isinstance(index.state_dict_metadata, dict):
        raise CorruptCheckpointError(f"checkpoint index {path} is invalid: it is not an index")
    for key, entry in index.state_dict_metadata.items():
        # Torch unpickles an entry of bytes, which is not a tensor, without any restriction.
        if type(entry) is not TensorStorageMetadata:
            raise CorruptCheckpointError(f"checkpoint index {path} is invalid: {key} is not a tensor")
        if not is_covered(entry):
            raise CorruptCheckpointError(f"checkpoint index {path} is invalid: chunks of {key} are missing")
    return index


def global_shapes(index: Metadata) -> dict[str, tuple[int, ...]]:
    """Return the global shape of every tensor of a checkpoint, by name."""
    entries = index.state_dict_metadata.items()
    return {key: tuple(entry.size) for key, entry in entries if isinstance(entry, TensorStorageMetadata)}


def is_covered(entry: TensorStorageMetadata) -> bool:
    """Return True if the chunks of a tensor, which do not overlap, cover all of it."""
    return sum(math.prod(chunk.sizes) for chunk in entry.chunks) == math.prod(entry.size)


class StoredTensors:
    """The chunks of a checkpoint on disk: memory-mapped, or read in part past the page cache.

    Raises:
        CorruptCheckpointError: the index, or a tensor that it points to, is invalid.
    """

    def __init__(self, folder: Path, index: Metadata | None = None) -> None:
        self._folder, self._index = folder, index or read_index(folder)
        self._chunks: dict[str, dict[tuple[int, ...], tuple[int, ...]]] = {}
        self._locations: dict[tuple[str, tuple[int, ...]], tuple[Path, int, int]] = {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every tensor, by name."""
        return global_shapes(self._index)

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype in which a tensor is stored."""
        return self._entry(key).properties.dtype

    def chunks(self, key: str) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Return the chunks that make up a tensor, as offset -> sizes."""
        if key not in self._chunks:
            chunks = self._entry(key).chunks
            self._chunks[key] = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in chunks}
        return self._chunks[key]

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self._index.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)  # read_index accepts nothing else
        return entry

    def mmap_chunk(self, key: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """Return one chunk as a memory-mapped CPU tensor of shape `sizes`. Do not write to it."""
        path, start, nbytes = self._locate(key, offset, sizes)
        raw = numpy.memmap(path, numpy.uint8, mode="c", offset=start, shape=(nbytes,))
        return torch.from_numpy(raw).view(self.dtype(key)).view(sizes)

    def read_chunk(
        self, key: str, offset: tuple[int, ...], sizes: tuple[int, ...], index: tuple[int | slice, ...]
    ) -> torch.Tensor:
        """Return `chunk[index]` of one chunk, in new memory, read from disk past the page cache.

        Args:
            index: integers, then slices with start and stop, one for every axis.
        """
        path, start, _ = self._locate(key, offset, sizes)
        dtype = self.dtype(key)
        rows_axis = next(axis for axis, entry in enumerate(index) if isinstance(entry, slice))
        rows = index[rows_axis]
        assert isinstance(rows, slice)
        first_row = 0
        for position, size in zip([*index[:rows_axis], rows.start], sizes, strict=False):
            first_row = first_row * size + position
        row_bytes = math.prod(sizes[rows_axis + 1 :]) * dtype.itemsize
        nbytes = (rows.stop - rows.start) * row_bytes
        raw = read_direct(path, start + first_row * row_bytes, nbytes)
        values = torch.from_numpy(raw).view(dtype).view(rows.stop - rows.start, *sizes[rows_axis + 1 :])
        return values[(slice(None), *index[rows_axis + 1 :])]

    def _locate(self, key: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[Path, int, int]:
        """Return file, first byte and number of bytes of a chunk."""
        if (key, offset) in self._locations:
            return self._locations[key, offset]
        dtype = self.dtype(key)
        try:
            stored = self._index.storage_data[MetadataIndex(key, torch.Size(offset))]
            path = self._folder / stored.relative_path
        except (KeyError, TypeError, AttributeError):
            raise CorruptCheckpointError(
                f"checkpoint {self._folder} is invalid: its index has no location for {key}"
            ) from None
        if path.parent != self._folder:
            raise CorruptCheckpointError(
                f"checkpoint {self._folder} is invalid: its index names a file outside the folder ({path})"
            )
        nbytes = math.prod(sizes) * dtype.itemsize
        try:
            location = path, _values_start(path, stored.offset, stored.length, nbytes), nbytes
            if sum(location[1:]) > path.stat().st_size:
                raise EOFError
        except (zipfile.BadZipFile, ValueError, EOFError, struct.error, NotImplementedError):
            # All that zipfile raises for damaged bytes; NotImplementedError for a damaged version number.
            raise CorruptCheckpointError(f"checkpoint file {path} is invalid: {key} in it is not a tensor") from None
        self._locations[key, offset] = location
        return location


def _values_start(path: Path, offset: int, length: int, nbytes: int) -> int:
    """Return the byte at which the values of a tensor start that `torch.save` wrote at `offset`.

    `torch.save` writes an uncompressed zip archive. The pickle in that archive is not read.

    Raises:
        ValueError: the archive is compressed, or does not hold `nbytes` bytes of values.
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
    """A file object over `length` bytes of another file, from `offset`."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = (0, self._position, self._length)[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._position)
        read = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._position)])  # type: ignore[attr-defined]
        self._position += read
        return read


class IndexReader(FileSystemReader):
    """Torch's reader, with the index read by `read_index`, and chunks read without a pickle."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_index(Path(self.path))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        stored = StoredTensors(Path(self.path))
        sizes = {
            (key, offset): sizes
            for key in {item.storage_index.fqn for item in plan.items}
            for offset, sizes in stored.chunks(key).items()
        }
        requested: dict[tuple[str, tuple[int, ...]], list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            assert item.storage_index.offset is not None
            requested[item.storage_index.fqn, tuple(item.storage_index.offset)].append(item)
        for (key, offset), items in requested.items():
            values = stored.mmap_chunk(key, offset, sizes[key, offset])
            for item in items:
                target = planner.resolve_tensor(item)
                target.copy_(narrow_tensor_by_index(values, item.storage_offsets, item.lengths))
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


@contextlib.contextmanager
def reraise_cause() -> Iterator[None]:
    """Raise the error that stopped torch's distributed checkpoint, instead of its collection of all ranks' errors."""
    try:
        yield
    except CheckpointException as error:
        if not error.failures:
            raise
        cause, _ = next(iter(error.failures.values()))
        raise cause from error
