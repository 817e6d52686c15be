"""Core attention: torch's scaled dot product with keys wider than values, as latent attention has them."""

import math
from typing import Any

import torch

from moonlight.model import sdpa
from moonlight.model.cpu_attention import CpuAttention

LOGITS_AT_ONCE = 2**25
"""Attention logits in memory while their maximum is sought: 128 MiB."""


@torch.no_grad()
def max_logits(
    query: torch.Tensor,
    key: torch.Tensor,
    softmax_scale: float,
    logits_at_once: int = LOGITS_AT_ONCE,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Largest softmax_scale * q k^T of each head over all sequences and causal pairs: float32 [heads].

    `query` and `key` [sequence, batch, heads, dim]; with `documents` [batch, sequence] only pairs within one count.
    A logit that is not a number makes its head's maximum one.
    """
    length, batch, heads, _ = query.shape
    rows = max(1, logits_at_once // (batch * heads * length))
    largest = torch.full((heads,), -math.inf, device=query.device)
    q, k = (x.permute(1, 2, 0, 3).float() for x in (query, key))  # [batch, heads, sequence, dim]
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        logits = q[:, :, start:stop] @ k[:, :, :stop].mT  # [batch, heads, rows, stop]
        future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1)
        logits[..., start:].masked_fill_(future, -math.inf)
        if documents is not None:
            apart = documents[:, start:stop, None] != documents[:, None, :stop]
            logits.masked_fill_(apart.unsqueeze(1), -math.inf)
        largest = torch.maximum(largest, logits.flatten(2).amax(2).amax(0))
    return largest * softmax_scale


class CausalAttention(torch.nn.Module):
    """softmax(q k^T * scale) v under a causal mask, with `mask_documents` within each document only.

    Shapes: q and k [sequence, batch, heads, nope + rope], v [sequence, batch, heads, v_head_dim];
    output [sequence, batch, heads * v_head_dim]. Heads are this tensor-parallel rank's own.

    Attributes:
        layer_number: of the whole model, from 1.
        max_logits: largest logit of each head since `record` was called, float32 [heads].
    """

    def __init__(self, *, softmax_scale: float, layer_number: int = 1, mask_documents: bool = False, **_: Any) -> None:
        super().__init__()
        self.mask_documents = mask_documents
        self.softmax_scale = softmax_scale
        self.layer_number = layer_number
        self.record(0)

    def record(self, passes: int) -> None:
        """Forget the maxima; the next `passes` training passes, one a micro-batch, are recorded."""
        self.max_logits = torch.tensor(-math.inf)
        self._passes_to_record = passes

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **_: Any,
    ) -> torch.Tensor:
        """`attention_mask`: number of each token's document, [batch, sequence]; None takes a sequence for one."""
        documents = attention_mask if self.mask_documents else None
        if self._passes_to_record and self.training and torch.is_grad_enabled():
            self._passes_to_record -= 1
            found = max_logits(query, key, self.softmax_scale, documents=documents)
            self.max_logits = torch.maximum(found, self.max_logits.to(found.device))
        if not query.is_cuda:
            return CpuAttention.apply(query, key, value, self.softmax_scale, documents).flatten(2)
        return sdpa.attention(query, key, value, self.softmax_scale, documents)
