"""The tensors of a checkpoint, written and read by all ranks through torch's distributed checkpoint.

What is on the disk is rectangles of whole tensors, and an index of them. Ranks may hold other rectangles when they read
than those that were written.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from moonlight.errors import UserError
from moonlight.model.pieces import Pieces, Streamed
from moonlight.train.index import IndexReader, cause_raised, is_covered, read_index, whole_shapes

ALIGNMENT = 64
"""Of every stored tensor, so that it can be used where it lies (`StoredTensors`)."""


class _Writer(dcp.FileSystemWriter):
    """Torch's writer, one file a rank, in this process.

    The index depends on the checkpoint alone: no path and no random number in it. Rectangles are written one after the
    other: torch's own `write_data` keeps a copy of each that is a view until the file is finished.
    """

    def storage_meta(self) -> None:
        return None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        results = []
        with (Path(self.path) / name).open("wb") as file:
            for item in plan.items:
                values = planner.resolve_data(item)
                assert isinstance(values, torch.Tensor)
                file.write(bytes(-file.tell() % ALIGNMENT))
                begin = file.tell()
                _write(values, file)
                length = file.tell() - begin
                results.append(WriteResult(item.index, length, _StorageInfo(name, begin, length)))
            file.flush()
            os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _write(values: torch.Tensor, file: BinaryIO) -> None:
    """Append a tensor, row after row, and not what else its storage holds."""
    values = values.cpu().contiguous()
    if values.untyped_storage().nbytes() != values.nbytes:
        values = values.clone()
    try:
        torch.save(values, file)
    except RuntimeError as error:
        # Of a disk that takes no more, and of Ctrl-C, torch only says that its archive is not where it should be.
        if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
            raise error.__context__ from None
        raise


class _SavePlanner(DefaultSavePlanner):
    """Torch's planner, which by itself looks for rectangles in tensors only."""

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class _LoadPlanner(DefaultLoadPlanner):
    """As above."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # Torch's own replaces everything in `state_dict` that it does not know by None.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


def save_tensors(folder: Path, state: Mapping[str, Pieces | Streamed]) -> None:
    """Write the whole tensors that all ranks hold together into `folder`, each rank a file of its own.

    Without a process group this process holds all of them.

    Raises:
        OSError: on every rank, if one cannot write.
    """
    planner = _SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with cause_raised():
        index = dcp.save(
            dict(state), storage_writer=_Writer(folder), planner=planner, no_dist=not dist.is_initialized()
        )
    for key, entry in index.state_dict_metadata.items():
        assert is_covered(entry), f"{key}: elements that no rank holds"


def load_tensors(folder: Path, state: dict[str, Pieces], *, all_of_it: bool = True) -> None:
    """Fill every rectangle of `state` from the checkpoint in `folder`. All ranks call it, each with its own part.

    Args:
        all_of_it: False accepts a checkpoint that holds more, such as momenta.

    Raises:
        UserError: the checkpoint cannot be read, or the tensors of all ranks together are not those it holds.
    """
    _check_names_and_shapes(folder, whole_shapes(read_index(folder)), state, all_of_it)
    planner = _LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with cause_raised():
        dcp.load(state, storage_reader=IndexReader(folder), planner=planner)


def _check_names_and_shapes(
    folder: Path, there: dict[str, tuple[int, ...]], state: dict[str, Pieces], all_of_it: bool
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
    if all_of_it and (unknown := there.keys() - wanted.keys()):
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
