"""Multi-head latent attention on Megatron's layers (DeepSeek-V2, arXiv 2405.04434, 2.1).

Positions can restart in each document of a sequence.
"""

from functools import lru_cache, partial
from typing import Any

from moonlight.megatron_compat import replace_te_linear

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from moonlight.kernels.rope import rotate, rotate_backward
from moonlight.model.linear import ReplicatedLinear
from moonlight.model.recompute import recompute_in_backward

replace_te_linear(ReplicatedLinear)


def positions_in_documents(document_ids: torch.Tensor) -> torch.Tensor:
    """Return the position of each token in its document, from 0: int64 [batch, sequence], as `document_ids`."""
    positions = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    is_start = torch.nn.functional.pad(document_ids.diff(dim=1), (1, 0)) > 0
    return positions - torch.where(is_start, positions, 0).cummax(1).values


@lru_cache(maxsize=2)
def _angles(length: int, dim: int, base: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of the rotary embedding: float32 [sequence, 1, 1, dim]. Cached for all layers."""
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    angles = torch.cat([angles, angles], dim=-1)[:, None, None]
    return angles.cos(), angles.sin()


@lru_cache(maxsize=1)
def _angles_in_documents(document_ids: torch.Tensor, dim: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines at each token's position in its document: float32 [sequence, batch, 1, dim]."""
    positions = positions_in_documents(document_ids).T.unsqueeze(2)
    cosine, sine = _angles(document_ids.shape[1], dim, base, document_ids.device)
    return cosine[:, 0, 0][positions], sine[:, 0, 0][positions]


class _ApplyRope(torch.autograd.Function):
    """Rotate the last `cosine.shape[-1]` dimensions of x [sequence, batch, heads, dim]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        out = x.clone()
        rotate(x[..., -cosine.shape[-1] :], cosine, sine, out[..., -cosine.shape[-1] :])
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        cosine, sine = ctx.saved_tensors
        out = grad.clone()
        out[..., -cosine.shape[-1] :] = rotate_backward(grad[..., -cosine.shape[-1] :], cosine, sine)
        return out, None, None


class LatentAttention(MLASelfAttention):
    """Multi-head latent attention with Megatron's parameters and our forward pass."""

    def __init__(self, *args: Any, reset_positions: bool, **kwargs: Any) -> None:
        """Initialize; with `reset_positions`, positions restart at 0 in each document of a sequence."""
        super().__init__(*args, **kwargs)
        self.reset_positions = reset_positions

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **_: Any) -> Any:
        """Return the output [sequence / TP, batch, hidden], with Megatron's bias, which is None.

        `attention_mask` is the document id of each token, [batch, sequence], or None: one document per sequence.
        """
        config = self.config
        query_input = hidden_states
        if config.q_lora_rank is not None:
            query_input = self.q_layernorm(self.linear_q_down_proj(hidden_states)[0])
        latent, rope_key = self.linear_kv_down_proj(hidden_states)[0].split(
            [config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1
        )
        angles = self._angles(rope_key, attention_mask)
        project = partial(self._up_projections, query_input, self.kv_layernorm(latent), rope_key, angles)
        query, key, keys_and_values = project()
        value = keys_and_values[..., config.qk_head_dim :]
        attended = self.core_attention(query, key, value, attention_mask)
        if "mla_up_proj" in config.recompute_modules:
            recompute_in_backward([query, key, keys_and_values], project, attended)
        return self.linear_proj(attended)

    def _up_projections(
        self,
        query_input: torch.Tensor,
        latent: torch.Tensor,
        rope_key: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and the joint key-value projection.

        Queries and keys are [sequence, batch, heads, nope + rope]; the joint projection is [sequence, batch, heads,
        nope + v_head_dim], keys without rope first. Inputs are [sequence / TP, batch, ...].
        """
        config = self.config
        query, _ = (self.linear_q_proj if config.q_lora_rank is None else self.linear_q_up_proj)(query_input)
        query = query.unflatten(-1, (-1, self.q_head_dim))
        if config.sequence_parallel:
            rope_key = gather_from_sequence_parallel_region(rope_key, group=self.tp_group)
        keys_and_values, _ = self.linear_kv_up_proj(latent)
        keys_and_values = keys_and_values.unflatten(-1, (query.shape[2], -1))
        query = _ApplyRope.apply(query, *angles)
        rope_key = _ApplyRope.apply(rope_key.unsqueeze(2), *angles).expand(-1, -1, query.shape[2], -1)
        return query, torch.cat([keys_and_values[..., : config.qk_head_dim], rope_key], dim=-1), keys_and_values

    def _angles(self, rope_key: torch.Tensor, document_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        dim, base = self.config.qk_pos_emb_head_dim, float(self.config.rotary_base)
        if self.reset_positions and document_ids is not None:
            return _angles_in_documents(document_ids, dim, base)
        length = len(rope_key) * (self.tp_group.size() if self.config.sequence_parallel else 1)
        return _angles(length, dim, base, rope_key.device)
