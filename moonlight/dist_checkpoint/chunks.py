"""What one process holds of the whole tensors of a checkpoint: rectangles, in memory or made when they are written.

Torch's distributed checkpoint writes and fills them through three methods with underscores (its protocol
`_Checkpointable`). Over all processes, rectangles of a tensor are equal (replicas, written once) or disjoint.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class LocalChunks:
    """What this rank holds of one whole tensor: rectangles of it in memory, none, one or many.

    Attributes:
        shape: of the whole tensor.
        rectangles: (offset in the whole tensor, values) of each; the values have as many dimensions as the whole, share
            memory with what was given, and are what loading writes into.
    """

    def __init__(self, shape: tuple[int, ...], rectangles: list[tuple[tuple[int, ...], torch.Tensor]]) -> None:
        self.shape = tuple(shape)
        # An empty rectangle would take the place of a full one that begins at the same offset.
        self.chunks = [(tuple(offset), values.detach()) for offset, values in rectangles if values.numel()]
        for offset, values in self.chunks:
            assert len(offset) == values.dim() == len(self.shape), (self.shape, offset, values.shape)
            ends = (start + size for start, size in zip(offset, values.shape, strict=True))
            inside = min(offset, default=0) >= 0 and all(e <= n for e, n in zip(ends, self.shape, strict=True))
            assert inside, (self.shape, offset, values.shape)
        self._at = dict(self.chunks)
        assert len(self._at) == len(self.chunks), "two rectangles at one offset"

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=values.dtype), torch.Size(self.shape)),
            )
            for chunk, (_, values) in zip(self.__create_chunk_list__(), self.chunks, strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), values.shape) for offset, values in self.chunks]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None, index
        return self._at[index.offset]


@dataclass(frozen=True)
class LazyTensor:
    """A whole tensor that is nowhere in memory: each of its rectangles is made when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: dict[tuple[int, ...], tuple[tuple[int, ...], Callable[[], torch.Tensor]]]
    """Offset in the whole tensor -> sizes, and what makes the values."""

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties, size = TensorProperties(dtype=self.dtype), torch.Size(self.shape)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, size),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes)) for offset, (sizes, _) in self.chunks.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None, index
        sizes, make = self.chunks[tuple(index.offset)]
        values = make()
        assert values.shape == sizes and values.dtype == self.dtype, (index, values.shape, values.dtype)
        return values


class CheckpointedOptimizer(Protocol):
    """What saving and loading need of an optimizer: its state as tensors with global names and shapes."""

    def master_state_dict(self) -> dict[str, LocalChunks]:
        """Return this rank's rows of the float32 master weights and router biases, by checkpoint name."""

    def optimizer_state_dict(self) -> dict[str, LocalChunks]:
        """Return this rank's rows of the momenta, under `optimizer.<momentum>.<parameter>`."""

    def iter_state_dicts(self) -> Iterator[dict[str, LocalChunks]]:
        """Iterate over master weights and momenta, with float32 copies of one parameter at a time."""

    def state_dict_metadata(self) -> dict[str, LocalChunks]:
        """Return names, shapes and dtypes of the whole state; values that are not stored are meta tensors."""

    def loading_masters(self) -> AbstractContextManager[dict[str, LocalChunks]]:
        """Yield `master_state_dict` to write into; on exit, update the model of every rank."""
