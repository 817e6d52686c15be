"""Core attention: torch's scaled dot product with keys wider than values, as latent attention has them."""

from typing import Any

import torch
import torch.nn.functional as F


class CausalAttention(torch.nn.Module):
    """softmax(q k^T * scale) v under a causal mask.

    Shapes: q and k [sequence, batch, heads, nope + rope], v [sequence, batch, heads, v_head_dim];
    output [sequence, batch, heads * v_head_dim]. Heads are this tensor-parallel rank's own.
    """

    def __init__(self, *, softmax_scale: float, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, **_: Any
    ) -> torch.Tensor:
        assert attention_mask is None, "attention is causal within one sequence; other masks are not supported"
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [batch, heads, sequence, dim]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).flatten(2)
