"""Which part of which whole tensor each parameter of this rank is, and the initial values that follow from it."""

import hashlib
from collections.abc import Sequence
from typing import TypeAlias

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.models.gpt import GPTModel

from moonlight.config.model import ModelConfig
from moonlight.dist_checkpoint import hf_mapping
from moonlight.dist_checkpoint.chunks import LocalChunks

ShardedParam: TypeAlias = ShardedTensor | ShardedTensorFactory


def collect_sharded_tensors(model_chunks: Sequence[GPTModel]) -> dict[str, ShardedParam]:
    """Parameters and persistent buffers of this rank under their whole-tensor names.

    A fused gate-and-up projection comes as a factory that yields its two pieces; all else as ShardedTensor.
    """
    state = {}
    for model in model_chunks:
        for value in model.sharded_state_dict(metadata={"non_homogeneous_layers": True}).values():
            if isinstance(value, ShardedTensor | ShardedTensorFactory):
                assert value.key not in state, value.key
                state[value.key] = value
    return state


def local_shards(sharded: ShardedParam) -> list[ShardedTensor]:
    """The ShardedTensors of one parameter; their data are views of it."""
    if isinstance(sharded, ShardedTensor):
        return [sharded]
    return list(sharded.build())


def local_chunks(sharded: ShardedParam) -> LocalChunks:
    """This rank's rectangles of a tensor as Megatron cut it."""
    parts = local_shards(sharded)
    return LocalChunks(
        to_hf_axes(parts[0].global_shape), [(to_hf_axes(part.global_offset), to_hf_layout(part.data)) for part in parts]
    )


def to_hf_axes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes or offsets of a tensor of the model as a checkpoint has it: experts [count, in, out] are [count, out, in]
    there, as Hugging Face turns them."""
    return tuple(sizes) if len(sizes) < 3 else (sizes[0], sizes[2], sizes[1])


def to_hf_layout(values: torch.Tensor) -> torch.Tensor:
    """The same of values, as a view."""
    return values if values.dim() < 3 else values.transpose(1, 2)


def _hugging_face_tensor(part: hf_mapping.HFTensor, seed: int, std: float) -> torch.Tensor:
    """Initial value of one Hugging Face tensor, float32: a function of the seed and its name alone."""
    if part.init_kind == "norm":
        return torch.ones(part.shape)
    if part.init_kind == "bias":
        return torch.zeros(part.shape)
    digest = hashlib.sha256(f"{seed}:{part.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(part.shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def init_weights(state: dict[str, LocalChunks], model_config: ModelConfig, seed: int) -> None:
    """Fill every rectangle of `state`, this rank's part of the model under the names of `collect_sharded_tensors`.

    The value of an element depends on the seed and on the Hugging Face tensor it belongs to, so every layout starts
    from the same bytes. Matrices are normal with standard deviation `model.initializer_range`.
    """
    rows = {row.key: row for row in hf_mapping.tensor_mappings(model_config)}
    for key, held in state.items():
        row = rows[key]
        assert held.shape == row.shape, (key, held.shape, row.shape)
        for offset, values in held.chunks:
            for part in row.hf_tensors:
                if common := hf_mapping.overlap(part, row, offset, tuple(values.shape)):
                    part_index, rectangle_index = common
                    value = _hugging_face_tensor(part, seed, model_config.initializer_range)
                    values[rectangle_index].copy_(value[part_index])
