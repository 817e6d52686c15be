"""QK-Clip of MuonClip: scale down the query and key weights of a head whose attention logits grow too large.

Kimi K2 (arXiv 2507.20534, 2.1), for latent attention: if the largest logit S of a head in a step exceeds the threshold
tau, then gamma = tau / S, otherwise 1. The nope parts of the head's queries and keys are each scaled by sqrt(gamma).
The rope part of its queries is scaled by gamma, because all heads share the rope key, which is not scaled. Every logit
of the head is thereby scaled by gamma.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from moonlight.config.model import ModelConfig
from moonlight.model.attention import CausalAttention


def collect_max_logits(attentions: Sequence[CausalAttention], group: dist.ProcessGroup) -> torch.Tensor:
    """Return the largest logit of each head that the layers recorded, float32 [layers, heads]. Collective.

    The maximum is infinite if a logit was NaN. `group`: the ranks with the same heads and other data (data and context
    parallelism). A pipeline stage without layers returns [0, 1] and exchanges nothing.
    """
    if not attentions:
        return torch.empty(0, 1, device=torch.cuda.current_device())
    maxima = torch.stack([attention.max_logits for attention in attentions])
    maxima = maxima.masked_fill(maxima.isnan(), math.inf)  # backends disagree on the maximum with a NaN
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
    return maxima


def logit_factors(maxima: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return gamma of each head, from the maxima of its logits: 1 up to the threshold, and if a logit is not finite."""
    return torch.where((maxima > threshold) & maxima.isfinite(), threshold / maxima, 1.0)


def row_factors(
    attentions: Sequence[CausalAttention], gammas: torch.Tensor, model_config: ModelConfig
) -> dict[str, torch.Tensor]:
    """Return the factors of the rows of this rank's query and key projections, for `DistributedMuon.step`.

    Args:
        gammas: float32 [layers, heads], of the local heads.

    Returns:
        Parameter name to float32 [rows].
    """
    query = "linear_q_proj" if model_config.q_lora_rank is None else "linear_q_up_proj"
    nope, rope, value = model_config.qk_nope_head_dim, model_config.qk_rope_head_dim, model_config.v_head_dim
    factors = {}
    for attention, gamma in zip(attentions, gammas, strict=True):
        layer = f"decoder.layers.{attention.layer_number - 1}.self_attention"
        root = gamma.sqrt()
        factors[f"{layer}.{query}.weight"] = _rows((root, nope), (gamma, rope))
        factors[f"{layer}.linear_kv_up_proj.weight"] = _rows((root, nope), (torch.ones_like(gamma), value))
    return factors


def _rows(*parts: tuple[torch.Tensor, int]) -> torch.Tensor:
    """Return factors [rows] of a projection, head after head. Each part of a head: factors [heads], number of rows."""
    return torch.cat([factor.unsqueeze(-1).expand(-1, rows) for factor, rows in parts], dim=-1).flatten()
