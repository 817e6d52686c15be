"""A checkpoint's index, which torch keeps as a pickle, read without letting it build or call anything else."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from moonlight.errors import UserError

_MODULES_OF_RECORDS = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")
_ACCEPTED = frozenset(
    {
        ("torch", "Size"),
        ("torch", "float32"),
        ("torch", "bfloat16"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    }
)


# Torch says so whenever one process reads a checkpoint by itself, which is what this reader is for.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class _IndexUnpickler(pickle.Unpickler):
    """Builds the record classes of a torch checkpoint index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ACCEPTED:
            return super().find_class(module, name)
        if module in _MODULES_OF_RECORDS and "." not in name:
            found = super().find_class(module, name)
            # Not what the module imported itself, such as other modules' functions.
            if isinstance(found, type) and found.__module__ == module:
                return found
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
    return index


def check_pickles(folder: Path) -> None:
    """Raise UserError if a file that Megatron would unpickle holds more than plain values; call it before loading."""
    read_index(folder)
    try:
        torch.load(folder / "common.pt", weights_only=True)
    except Exception:  # as above
        raise UserError(f"checkpoint file {folder / 'common.pt'} is refused: it holds more than plain values") from None


class IndexReader(FileSystemReader):
    """Torch's checkpoint reader with its index read by `read_index`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_index(Path(self.path))
