"""Core attention: causal scaled dot-product attention with keys wider than values, as latent attention needs."""

import math
from typing import Any

import torch

from moonlight.model import sdpa
from moonlight.model.cpu_attention import CpuAttention

LOGITS_CHUNK_ELEMENTS = 2**25
"""Maximum number of attention logits that `max_logits` holds in memory: 128 MiB in float32."""


@torch.no_grad()
def max_logits(
    query: torch.Tensor,
    key: torch.Tensor,
    softmax_scale: float,
    chunk_elements: int = LOGITS_CHUNK_ELEMENTS,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the largest softmax_scale * q k^T of each head, over all sequences and causal pairs: float32 [heads].

    The maximum of a head is NaN if one of its logits is NaN.

    Args:
        query: [sequence, batch, heads, dim].
        key: [sequence, batch, heads, dim].
        chunk_elements: maximum number of logits in memory.
        document_ids: [batch, sequence]; if present, only pairs within one document count.
    """
    length, batch, heads, _ = query.shape
    rows = max(1, chunk_elements // (batch * heads * length))
    largest = torch.full((heads,), -math.inf, device=query.device)
    q, k = (x.permute(1, 2, 0, 3).float() for x in (query, key))  # [batch, heads, sequence, dim]
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        logits = q[:, :, start:stop] @ k[:, :, :stop].mT  # [batch, heads, rows, stop]
        future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1)
        logits[..., start:].masked_fill_(future, -math.inf)
        if document_ids is not None:
            other_document = document_ids[:, start:stop, None] != document_ids[:, None, :stop]
            logits.masked_fill_(other_document.unsqueeze(1), -math.inf)
        largest = torch.maximum(largest, logits.flatten(2).amax(2).amax(0))
    return largest * softmax_scale


class CausalAttention(torch.nn.Module):
    """softmax(q k^T * scale) v under a causal mask; with `mask_documents`, within each document only.

    Shapes: q and k [sequence, batch, heads, nope + rope], v [sequence, batch, heads, v_head_dim];
    output [sequence, batch, heads * v_head_dim]. `heads` counts the heads of this tensor-parallel rank.

    Attributes:
        layer_number: number of the layer in the full model, from 1.
        max_logits: largest logit of each head since the last call of `record`, float32 [heads].
    """

    def __init__(self, *, softmax_scale: float, layer_number: int = 1, mask_documents: bool = False, **_: Any) -> None:
        super().__init__()
        self.mask_documents = mask_documents
        self.softmax_scale = softmax_scale
        self.layer_number = layer_number
        self.record(0)

    def record(self, passes: int) -> None:
        """Reset the maxima, then record the next `passes` training passes, one per micro-batch."""
        self.max_logits = torch.tensor(-math.inf)
        self._passes_to_record = passes

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **_: Any
    ) -> torch.Tensor:
        """Return the attention output; see the class for shapes.

        `attention_mask` is the document id of each token, [batch, sequence]; None means one document per sequence.
        """
        document_ids = attention_mask if self.mask_documents else None
        if self._passes_to_record and self.training and torch.is_grad_enabled():
            self._passes_to_record -= 1
            maxima = max_logits(query, key, self.softmax_scale, document_ids=document_ids)
            self.max_logits = torch.maximum(maxima, self.max_logits.to(maxima.device))
        if not query.is_cuda:
            return CpuAttention.apply(query, key, value, self.softmax_scale, document_ids).flatten(2)
        return sdpa.attention(query, key, value, self.softmax_scale, document_ids)
