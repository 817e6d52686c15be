"""A checkpoint's index, which torch keeps as a pickle, and its tensors, read without letting them call anything."""

import contextlib
import math
import pickle
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from moonlight.errors import UserError

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
        UserError: it is not an index, or it names code to run.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except FileNotFoundError:
        raise UserError(f"checkpoint {folder} is incomplete: .metadata is missing") from None
    except Exception as error:  # bytes that are no pickle can end an unpickler in any way
        raise UserError(f"checkpoint index {path} is refused: {error or type(error).__name__}") from None
    if not isinstance(index, Metadata) or not isinstance(index.state_dict_metadata, dict):
        raise UserError(f"checkpoint index {path} is refused: it is no index")
    for key, entry in index.state_dict_metadata.items():
        # Torch unpickles, without any restriction, what the index calls bytes instead of a tensor.
        if type(entry) is not TensorStorageMetadata:
            raise UserError(f"checkpoint index {path} is refused: {key} is no tensor")
        if not is_covered(entry):
            raise UserError(f"checkpoint index {path} is refused: parts of {key} are missing")
    return index


def whole_shapes(index: Metadata) -> dict[str, tuple[int, ...]]:
    """The shape of every whole tensor of a checkpoint."""
    entries = index.state_dict_metadata.items()
    return {key: tuple(entry.size) for key, entry in entries if isinstance(entry, TensorStorageMetadata)}


def is_covered(entry: TensorStorageMetadata) -> bool:
    """Whether the rectangles of a tensor, which do not overlap, make up the whole of it."""
    return sum(math.prod(chunk.sizes) for chunk in entry.chunks) == math.prod(entry.size)


class IndexReader(FileSystemReader):
    """Torch's reader, with the index read by `read_index` and every stored rectangle read once.

    Torch reads a stored rectangle anew for each rectangle that it fills a part of: for each of 64 experts, all of them.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_index(Path(self.path))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[MetadataIndex, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            wanted[item.storage_index].append(item)
        for index, items in wanted.items():
            stored = self._stored(index)
            for item in items:
                target = planner.resolve_tensor(item)
                target.copy_(narrow_tensor_by_index(stored, item.storage_offsets, item.lengths))
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _stored(self, index: MetadataIndex) -> torch.Tensor:
        """One stored rectangle, on the CPU."""
        place = self.storage_data[index]
        path = Path(self.path) / place.relative_path
        with path.open("rb") as file:
            try:
                stored = torch.load(self._slice_file(file, place), map_location="cpu", weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError):
                stored = None
        if not isinstance(stored, torch.Tensor):
            raise UserError(f"checkpoint file {path} is refused: {index.fqn} in it is no tensor")
        return stored


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
