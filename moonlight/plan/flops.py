"""Parameter counts of a model and FLOPs of its training, from the recipe alone.

All counts are sums over `hf_mapping.tensor_mappings`, so a part that a model does not have counts as zero.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from moonlight.config.model import ModelConfig
from moonlight.dist_checkpoint import hf_mapping

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
"""Keys in checkpoints."""


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameter counts of a model, including its router biases."""

    total: int
    total_without_embeddings: int
    """Without embedding and head."""
    activated: int
    """Parameters that one token uses, without embedding and head; of the routed experts, only `num_experts_per_tok`."""
    activated_with_head: int
    """Parameters that one token is multiplied by. In a tied model, the embedding counts as the head."""


def count_parameters(model_config: ModelConfig) -> ParameterCounts:
    """Count a model's parameters."""
    sizes = {mapping.key: math.prod(mapping.shape) for mapping in hf_mapping.tensor_mappings(model_config)}
    routed = sum(size for key, size in sizes.items() if ".mlp.experts." in key)
    total = sum(sizes.values())
    without_embeddings = total - sizes[EMBEDDING] - sizes.get(HEAD, 0)
    activated = without_embeddings - routed + routed * model_config.num_experts_per_tok // model_config.num_experts
    return ParameterCounts(
        total=total,
        total_without_embeddings=without_embeddings,
        activated=activated,
        activated_with_head=activated + sizes.get(HEAD, sizes[EMBEDDING]),
    )


@lru_cache
def train_flops_per_token(model_config: ModelConfig, sequence_length: int) -> float:
    """Return the FLOPs of forward and backward pass for one token, averaged over a causal sequence.

    Each activated parameter and each parameter of the head counts six: one multiplication and one addition, forward and
    twice backward. Each product of queries with keys and of attention weights with values also counts six; the causal
    mask halves these products. The count excludes optimizer, norms, activations and recomputation.
    """
    return sum(train_flops_by_part(model_config, sequence_length))


@lru_cache(maxsize=8)
def train_flops_by_part(model_config: ModelConfig, sequence_length: int) -> tuple[float, ...]:
    """Return the terms of `train_flops_per_token`: one for each layer, then one for the head and the final norm."""
    widths = model_config.qk_nope_head_dim + model_config.qk_rope_head_dim + model_config.v_head_dim
    attention = sequence_length * model_config.num_attention_heads * widths / 2
    parts = [6 * attention] * model_config.num_hidden_layers + [0.0]
    sizes = {mapping.key: math.prod(mapping.shape) for mapping in hf_mapping.tensor_mappings(model_config)}
    for key, size in sizes.items():
        active = size * model_config.num_experts_per_tok // model_config.num_experts if ".mlp.experts." in key else size
        if key.startswith("decoder.layers."):
            parts[int(key.split(".")[2])] += 6 * active
        elif key != EMBEDDING:
            parts[-1] += 6 * active
    if HEAD not in sizes:
        parts[-1] += 6 * sizes[EMBEDDING]
    return tuple(parts)
