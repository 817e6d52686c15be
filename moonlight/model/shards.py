"""Which part of which whole tensor each parameter of this rank is, and the initial values that follow from it."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import moonlight.cpu  # noqa: F401  (stand-ins, before Megatron)

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from moonlight import mapping
from moonlight.config import Model

Sharded: TypeAlias = ShardedTensor | ShardedTensorFactory


class Pieces:
    """What this rank holds of one whole tensor of a checkpoint: rectangles of it, none, one or many.

    Torch's distributed checkpoint writes and fills it through the three methods with underscores (its protocol
    `_Checkpointable`). Over all ranks, rectangles are equal (replicas, written once) or disjoint.

    Attributes:
        shape: of the whole tensor.
        rectangles: (offset in the whole tensor, values) of each; the values have as many dimensions as the whole, share
            memory with what was given, and are what loading writes into.
    """

    def __init__(self, shape: tuple[int, ...], rectangles: list[tuple[tuple[int, ...], torch.Tensor]]) -> None:
        self.shape = tuple(shape)
        # An empty rectangle would take the place of a full one that begins at the same offset.
        self.rectangles = [(tuple(offset), values.detach()) for offset, values in rectangles if values.numel()]
        for offset, values in self.rectangles:
            assert len(offset) == values.dim() == len(self.shape), (self.shape, offset, values.shape)
            ends = (start + size for start, size in zip(offset, values.shape, strict=True))
            inside = min(offset, default=0) >= 0 and all(e <= n for e, n in zip(ends, self.shape, strict=True))
            assert inside, (self.shape, offset, values.shape)
        self._at = dict(self.rectangles)
        assert len(self._at) == len(self.rectangles), "two rectangles at one offset"

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=values.dtype), torch.Size(self.shape)),
            )
            for chunk, (_, values) in zip(self.__create_chunk_list__(), self.rectangles, strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), values.shape) for offset, values in self.rectangles]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None, index
        return self._at[index.offset]


def sharded_state(models: Sequence[GPTModel]) -> dict[str, Sharded]:
    """Parameters and persistent buffers of this rank under their whole-tensor names.

    A fused gate-and-up projection comes as a factory that yields its two pieces; all else as ShardedTensor.
    """
    state = {}
    for model in models:
        for value in model.sharded_state_dict(metadata={"non_homogeneous_layers": True}).values():
            if isinstance(value, ShardedTensor | ShardedTensorFactory):
                assert value.key not in state, value.key
                state[value.key] = value
    return state


def pieces(sharded: Sharded) -> list[ShardedTensor]:
    """The ShardedTensors of one parameter; their data are views of it."""
    if isinstance(sharded, ShardedTensor):
        return [sharded]
    return list(sharded.build())


def pieces_of(sharded: Sharded) -> Pieces:
    """This rank's rectangles of a tensor as Megatron cut it."""
    parts = pieces(sharded)
    return Pieces(parts[0].global_shape, [(part.global_offset, part.data) for part in parts])


def _hugging_face_tensor(part: mapping.Part, seed: int, std: float) -> torch.Tensor:
    """Initial value of one Hugging Face tensor, float32: a function of the seed and its name alone."""
    if part.kind == "norm":
        return torch.ones(part.shape)
    if part.kind == "bias":
        return torch.zeros(part.shape)
    digest = hashlib.sha256(f"{seed}:{part.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(part.shape).normal_(0.0, std, generator=generator)


def _overlap(
    part: mapping.Part, row: mapping.Row, offset: tuple[int, ...], shape: tuple[int, ...]
) -> Iterator[tuple[tuple, tuple]]:
    """Where `part` and a rectangle meet: (index into the part as the checkpoint has it, index into the rectangle)."""
    part_index: list[slice] = []
    rectangle_index: list[int | slice] = []
    for axis, size in enumerate(row.shape):
        where = part.index[axis] if axis < len(part.index) else slice(0, size)
        low, high = (where, where + 1) if isinstance(where, int) else (where.start, where.stop)
        begin = offset[axis]
        start, stop = max(low, begin), min(high, begin + shape[axis])
        if start >= stop:
            return
        if isinstance(where, int):
            rectangle_index.append(start - begin)
        else:
            rectangle_index.append(slice(start - begin, stop - begin))
            part_index.append(slice(start - low, stop - low))
    yield tuple(part_index), tuple(rectangle_index)


@torch.no_grad()
def initialize(state: dict[str, Pieces], model: Model, seed: int) -> None:
    """Fill every rectangle of `state`, this rank's part of the model under the names of `sharded_state`.

    The value of an element depends on the seed and on the Hugging Face tensor it belongs to, so every layout starts
    from the same bytes. Matrices are normal with standard deviation `model.initializer_range`.
    """
    rows = {row.key: row for row in mapping.table(model)}
    for key, held in state.items():
        row = rows[key]
        assert held.shape == row.shape, (key, held.shape, row.shape)
        for offset, values in held.rectangles:
            for part in row.parts:
                for part_index, rectangle_index in _overlap(part, row, offset, values.shape):
                    value = _hugging_face_tensor(part, seed, model.initializer_range)
                    value = value.T if part.transposed else value
                    values[rectangle_index].copy_(value[part_index])
