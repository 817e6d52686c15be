"""MuonClip: query and key weights of a head shrink when its attention logits grow too large.

Kimi K2 (arXiv 2507.20534, 2.1), for latent attention: a head whose largest logit S of a step exceeds tau gets
gamma = tau / S. Its own nope parts of queries and keys are scaled by sqrt(gamma) each, the rope part of its queries by
gamma, because the rope key belongs to all heads and stays. Every logit of the head is thereby scaled by gamma.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from moonlight.config.model import ModelConfig
from moonlight.model.attention import CausalAttention


def collect_max_logits(attentions: Sequence[CausalAttention], group: dist.ProcessGroup) -> torch.Tensor:
    """What was recorded, float32 [layers, heads]; infinite where a logit was not a number.

    `group` joins the ranks that saw other data with the same heads (data- and context-parallel). A pipeline stage
    without layers has none, and nothing to exchange.
    """
    if not attentions:
        return torch.empty(0, 1, device=torch.cuda.current_device())
    maxima = torch.stack([attention.max_logits for attention in attentions])
    maxima = maxima.masked_fill(maxima.isnan(), math.inf)  # backends disagree on the maximum with a NaN
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
    return maxima


def logit_factors(maxima: torch.Tensor, threshold: float) -> torch.Tensor:
    """gamma of each head, given the maxima of its logits: 1 up to the threshold, and where a logit was not finite."""
    return torch.where((maxima > threshold) & maxima.isfinite(), threshold / maxima, 1.0)


def row_factors(
    attentions: Sequence[CausalAttention], gammas: torch.Tensor, model_config: ModelConfig
) -> dict[str, torch.Tensor]:
    """By what to multiply the rows of this rank's projections, as `DistributedMuon.step` takes it.

    Args:
        gammas: float32 [layers, heads], of the local heads.
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
    """Factors [rows] of a projection, head after head; `parts` of a head: a factor per head, and how many rows."""
    return torch.cat([factor.unsqueeze(-1).expand(-1, rows) for factor, rows in parts], dim=-1).flatten()
