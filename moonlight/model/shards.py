"""Which part of which whole tensor each parameter of this rank is, and the initial values that follow from it."""

import hashlib
from collections.abc import Sequence
from typing import TypeAlias

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.models.gpt import GPTModel

from moonlight.config.model import Model
from moonlight.dist_checkpoint import hf_mapping
from moonlight.dist_checkpoint.chunks import Pieces

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


def pieces_of(sharded: Sharded) -> Pieces:
    """This rank's rectangles of a tensor as Megatron cut it."""
    parts = pieces(sharded)
    return Pieces(
        turned(parts[0].global_shape), [(turned(part.global_offset), turned_view(part.data)) for part in parts]
    )


def turned(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes or offsets of a tensor of the model as a checkpoint has it: experts [count, in, out] are [count, out, in]
    there, as Hugging Face turns them."""
    return tuple(sizes) if len(sizes) < 3 else (sizes[0], sizes[2], sizes[1])


def turned_view(values: torch.Tensor) -> torch.Tensor:
    """The same of values, as a view."""
    return values if values.dim() < 3 else values.transpose(1, 2)


def _hugging_face_tensor(part: hf_mapping.Part, seed: int, std: float) -> torch.Tensor:
    """Initial value of one Hugging Face tensor, float32: a function of the seed and its name alone."""
    if part.kind == "norm":
        return torch.ones(part.shape)
    if part.kind == "bias":
        return torch.zeros(part.shape)
    digest = hashlib.sha256(f"{seed}:{part.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(part.shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialize(state: dict[str, Pieces], model: Model, seed: int) -> None:
    """Fill every rectangle of `state`, this rank's part of the model under the names of `sharded_state`.

    The value of an element depends on the seed and on the Hugging Face tensor it belongs to, so every layout starts
    from the same bytes. Matrices are normal with standard deviation `model.initializer_range`.
    """
    rows = {row.key: row for row in hf_mapping.table(model)}
    for key, held in state.items():
        row = rows[key]
        assert held.shape == row.shape, (key, held.shape, row.shape)
        for offset, values in held.rectangles:
            for part in row.parts:
                if common := hf_mapping.overlap(part, row, offset, tuple(values.shape)):
                    part_index, rectangle_index = common
                    value = _hugging_face_tensor(part, seed, model.initializer_range)
                    values[rectangle_index].copy_(value[part_index])
