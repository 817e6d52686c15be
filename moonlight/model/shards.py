"""Which part of which whole tensor each parameter of this rank is, and the initial values that follow from it."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import moonlight.cpu  # noqa: F401  (stand-ins, before Megatron)

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.models.gpt import GPTModel

from moonlight import mapping
from moonlight.config import Model

Sharded: TypeAlias = ShardedTensor | ShardedTensorFactory


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


@dataclass
class Pieces:
    """What this rank holds of one whole tensor of a checkpoint: rectangles of it."""

    shape: tuple[int, ...]
    rectangles: list[tuple[tuple[int, ...], torch.Tensor]]


def pieces_of(sharded: Sharded) -> Pieces:
    """The rectangles of a tensor as Megatron cut it."""
    found = pieces(sharded)
    return Pieces(tuple(found[0].global_shape), [(tuple(p.global_offset), p.data.detach()) for p in found])


def is_first_replica(sharded: Sharded) -> bool:
    """Whether this rank's copy is the one that counts where each element must count once in the world."""
    replica = sharded.replica_id
    return replica == 0 if isinstance(replica, int) else all(index == 0 for index in replica)


def _hugging_face_tensor(part: mapping.Part, seed: int, std: float) -> torch.Tensor:
    """Initial value of one Hugging Face tensor, float32: a function of the seed and its name alone."""
    if part.kind == "norm":
        return torch.ones(part.shape)
    if part.kind == "bias":
        return torch.zeros(part.shape)
    digest = hashlib.sha256(f"{seed}:{part.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(part.shape).normal_(0.0, std, generator=generator)


def _overlap(part: mapping.Part, row: mapping.Row, piece_offset, piece_shape) -> Iterator[tuple[tuple, tuple]]:
    """Where `part` and `piece` meet: (index into the part as the checkpoint lays it out, index into the piece)."""
    part_index: list[slice] = []
    piece_index: list[int | slice] = []
    for axis, size in enumerate(row.shape):
        where = part.index[axis] if axis < len(part.index) else slice(0, size)
        low, high = (where, where + 1) if isinstance(where, int) else (where.start, where.stop)
        offset, length = piece_offset[axis], piece_shape[axis]
        start, stop = max(low, offset), min(high, offset + length)
        if start >= stop:
            return
        if isinstance(where, int):
            piece_index.append(start - offset)
        else:
            piece_index.append(slice(start - offset, stop - offset))
            part_index.append(slice(start - low, stop - low))
    yield tuple(part_index), tuple(piece_index)


@torch.no_grad()
def initialize(state: dict[str, Sharded], model: Model, seed: int) -> None:
    """Fill every tensor of `state`, this rank's part of the model as `sharded_state` names it.

    The value of an element depends on the seed and on the Hugging Face tensor it belongs to, so every layout starts
    from the same bytes. Matrices are normal with standard deviation `model.initializer_range`.
    """
    rows = {row.key: row for row in mapping.table(model)}
    for key, sharded in state.items():
        row = rows[key]
        for off, data in sharded.rectangles:
            for part in row.parts:
                for part_index, piece_index in _overlap(part, row, off, data.shape):
                    value = _hugging_face_tensor(part, seed, model.initializer_range)
                    value = value.T if part.transposed else value
                    data[piece_index].copy_(value[part_index])
