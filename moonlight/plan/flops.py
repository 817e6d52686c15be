"""Parameters of a model and the arithmetic of training it, from its recipe alone.

Everything is counted on the rows of `mapping.table`, so a model that has no tensor for something counts none for it.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from moonlight.config.model import ModelConfig
from moonlight.dist_checkpoint import hf_mapping

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameters of a model, the values of its router biases among them."""

    total: int
    total_without_embeddings: int
    """Without embedding and head."""
    activated: int
    """What one token meets, without embedding and head: of the routed experts, only as many as a token is sent to."""
    activated_with_head: int
    """What one token is multiplied by. Tied models multiply by their embedding, which here counts as the head."""


def count_parameters(model_config: ModelConfig) -> ParameterCounts:
    """Count a model's parameters."""
    sizes = {row.key: math.prod(row.shape) for row in hf_mapping.tensor_mappings(model_config)}
    routed = sum(size for key, size in sizes.items() if ".mlp.experts." in key)
    total = sum(sizes.values())
    inside = total - sizes[_EMBEDDING] - sizes.get(_HEAD, 0)
    activated = inside - routed + routed * model_config.num_experts_per_tok // model_config.num_experts
    return ParameterCounts(
        total=total,
        total_without_embeddings=inside,
        activated=activated,
        activated_with_head=activated + sizes.get(_HEAD, sizes[_EMBEDDING]),
    )


@lru_cache
def train_flops_per_token(model_config: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations of forward and backward pass for one token, on average over a causal sequence.

    Six for each activated parameter and those of the head (a multiplication and an addition, forward and twice
    backward), and six for each multiplication of queries with keys and of weights with values, of which a causal mask
    leaves half. The optimizer, norms and activations are not counted, nor is anything computed twice to save memory.
    """
    return sum(train_flops_by_part(model_config, sequence_length))


@lru_cache(maxsize=8)
def train_flops_by_part(model_config: ModelConfig, sequence_length: int) -> tuple[float, ...]:
    """The same of every layer by itself, and last of the head with its norm."""
    widths = model_config.qk_nope_head_dim + model_config.qk_rope_head_dim + model_config.v_head_dim
    attention = sequence_length * model_config.num_attention_heads * widths / 2
    parts = [6 * attention] * model_config.num_hidden_layers + [0.0]
    sizes = {row.key: math.prod(row.shape) for row in hf_mapping.tensor_mappings(model_config)}
    for key, size in sizes.items():
        active = size * model_config.num_experts_per_tok // model_config.num_experts if ".mlp.experts." in key else size
        if key.startswith("decoder.layers."):
            parts[int(key.split(".")[2])] += 6 * active
        elif key != _EMBEDDING:
            parts[-1] += 6 * active
    if _HEAD not in sizes:
        parts[-1] += 6 * sizes[_EMBEDDING]
    return tuple(parts)
