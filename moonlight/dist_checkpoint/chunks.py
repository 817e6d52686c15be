"""Chunks of a checkpoint's global tensors that one process holds, in memory or computed when they are written.

A chunk is a rectangular block of a tensor. Torch's distributed checkpoint writes and fills chunks through the three
dunder methods of its `_Checkpointable` protocol. Over all processes, two chunks of a tensor are equal (replicas, which
are written once) or disjoint.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class LocalChunks:
    """The chunks of one global tensor that this rank holds in memory; may be empty.

    Attributes:
        shape: shape of the global tensor.
        chunks: (offset in the global tensor, values) of each chunk that is not empty. The values have as many
            dimensions as the global tensor and share memory with the tensors passed in. Loading writes into them.
    """

    def __init__(self, shape: tuple[int, ...], chunks: list[tuple[tuple[int, ...], torch.Tensor]]) -> None:
        self.shape = tuple(shape)
        # An empty chunk would replace a non-empty chunk at the same offset.
        self.chunks = [(tuple(offset), values.detach()) for offset, values in chunks if values.numel()]
        for offset, values in self.chunks:
            assert len(offset) == values.dim() == len(self.shape), (self.shape, offset, values.shape)
            stops = (start + size for start, size in zip(offset, values.shape, strict=True))
            is_inside = min(offset, default=0) >= 0 and all(e <= n for e, n in zip(stops, self.shape, strict=True))
            assert is_inside, (self.shape, offset, values.shape)
        self._by_offset = dict(self.chunks)
        assert len(self._by_offset) == len(self.chunks), "two chunks at one offset"

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        chunks = zip(self.__create_chunk_list__(), self.chunks, strict=True)
        return [_write_item(fqn, self.shape, chunk, values.dtype) for chunk, (_, values) in chunks]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), values.shape) for offset, values in self.chunks]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None, index
        return self._by_offset[index.offset]


@dataclass(frozen=True)
class LazyTensor:
    """A global tensor that is not in memory: each chunk is computed when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: Mapping[tuple[int, ...], tuple[tuple[int, ...], Callable[[], torch.Tensor]]]
    """Offset in the global tensor -> (sizes, function that returns the values)."""

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [_write_item(fqn, self.shape, chunk, self.dtype) for chunk in self.__create_chunk_list__()]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes)) for offset, (sizes, _) in self.chunks.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None, index
        sizes, compute = self.chunks[tuple(index.offset)]
        values = compute()
        assert values.shape == sizes and values.dtype == self.dtype, (index, values.shape, values.dtype)
        return values


def _write_item(key: str, shape: tuple[int, ...], chunk: ChunkStorageMetadata, dtype: torch.dtype) -> WriteItem:
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(shape))
    return WriteItem(MetadataIndex(key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class CheckpointedOptimizer(Protocol):
    """Optimizer interface for saving and loading: its state as tensors with global names and shapes."""

    def master_state_dict(self) -> dict[str, LocalChunks]:
        """Return this rank's rows of the float32 master weights and router biases, by checkpoint name."""

    def optimizer_state_dict(self) -> dict[str, LocalChunks]:
        """Return this rank's rows of the momenta, under `optimizer.<momentum>.<parameter>`."""

    def iter_state_dicts(self) -> Iterator[dict[str, LocalChunks]]:
        """Iterate over master weights and momenta, with float32 copies of one parameter at a time."""

    def state_dict_metadata(self) -> dict[str, LocalChunks]:
        """Return names, shapes and dtypes of the full state; values that are not stored are meta tensors."""

    def loading_masters(self) -> AbstractContextManager[dict[str, LocalChunks]]:
        """Yield `master_state_dict` to write into; on exit, update the model of every rank."""
