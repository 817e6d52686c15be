"""This rank's shards of the model's global tensors, and their initial values."""

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
    """Return the parameters and persistent buffers of this rank by the name of their global tensor.

    A fused gate-and-up projection is a factory of two ShardedTensors; all other values are ShardedTensors.
    """
    state = {}
    for model in model_chunks:
        for value in model.sharded_state_dict(metadata={"non_homogeneous_layers": True}).values():
            if isinstance(value, ShardedTensor | ShardedTensorFactory):
                assert value.key not in state, value.key
                state[value.key] = value
    return state


def local_shards(sharded: ShardedParam) -> list[ShardedTensor]:
    """Return the ShardedTensors of one parameter; their data are views of the parameter."""
    if isinstance(sharded, ShardedTensor):
        return [sharded]
    return list(sharded.build())


def local_chunks(sharded: ShardedParam) -> LocalChunks:
    """Return this rank's chunks of a tensor that Megatron sharded, in Hugging Face layout."""
    shards = local_shards(sharded)
    return LocalChunks(
        to_hf_axes(shards[0].global_shape),
        [(to_hf_axes(shard.global_offset), to_hf_layout(shard.data)) for shard in shards],
    )


def to_hf_axes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return sizes or offsets of a model tensor in checkpoint order.

    Experts [count, in, out] become [count, out, in]: transposed to Hugging Face layout.
    """
    return tuple(sizes) if len(sizes) < 3 else (sizes[0], sizes[2], sizes[1])


def to_hf_layout(values: torch.Tensor) -> torch.Tensor:
    """Return the values of a model tensor in checkpoint order, as a view."""
    return values if values.dim() < 3 else values.transpose(1, 2)


def _initial_values(hf_tensor: hf_mapping.HFTensor, seed: int, std: float) -> torch.Tensor:
    """Return the initial float32 values of one Hugging Face tensor: a function of the seed and its name alone."""
    if hf_tensor.init_kind == "norm":
        return torch.ones(hf_tensor.shape)
    if hf_tensor.init_kind == "bias":
        return torch.zeros(hf_tensor.shape)
    digest = hashlib.sha256(f"{seed}:{hf_tensor.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(hf_tensor.shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def init_weights(state: dict[str, LocalChunks], model_config: ModelConfig, seed: int) -> None:
    """Fill every chunk of `state`, this rank's part of the model by the names of `collect_sharded_tensors`.

    The value of an element depends only on the seed and on the Hugging Face tensor that contains it. The initial
    weights are therefore bit-identical in every layout. Matrices are normal with standard deviation
    `model.initializer_range`, norms 1, router biases 0.
    """
    mappings = {mapping.key: mapping for mapping in hf_mapping.tensor_mappings(model_config)}
    for key, local in state.items():
        mapping = mappings[key]
        assert local.shape == mapping.shape, (key, local.shape, mapping.shape)
        for offset, values in local.chunks:
            for hf_tensor in mapping.hf_tensors:
                if overlap := hf_mapping.overlap(hf_tensor, mapping, offset, tuple(values.shape)):
                    hf_index, chunk_index = overlap
                    initial = _initial_values(hf_tensor, seed, model_config.initializer_range)
                    values[chunk_index].copy_(initial[hf_index])
