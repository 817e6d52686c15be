"""Megatron's latent attention, with positions that can begin anew in every document of a sequence."""

from typing import Any

import moonlight.cpu  # noqa: F401  (stand-ins, before Megatron)

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.multi_latent_attention import MLASelfAttention


def positions_in_documents(documents: torch.Tensor) -> torch.Tensor:
    """Place of each token in its document, from 0: int64 [batch, sequence], as `documents` numbers them."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.nn.functional.pad(documents.diff(dim=1), (1, 0)) > 0
    return places - torch.where(begins, places, 0).cummax(1).values


class _Rotary(torch.nn.Module):
    """Angles of the rotary embedding, for every sequence of a batch by itself if `documents` is set."""

    def __init__(self, whole: RotaryEmbedding) -> None:
        super().__init__()
        self.whole = whole
        self.get_rotary_seq_len = whole.get_rotary_seq_len
        self.documents: torch.Tensor | None = None

    def forward(self, length: int, packed_seq: bool = False) -> torch.Tensor:
        """[sequence, 1, 1, dim] as Megatron has them, or else [sequence, batch, 1, dim]."""
        angles = self.whole(length, packed_seq=packed_seq)
        if self.documents is None:
            return angles
        return angles[:, 0, 0][positions_in_documents(self.documents).T].unsqueeze(2)


class LatentAttention(MLASelfAttention):
    """Megatron's, whose `attention_mask` is the number of each token's document, [batch, sequence], or None."""

    rotary_pos_emb: Any

    def __init__(self, *args: Any, reset_positions: bool, **others: Any) -> None:
        super().__init__(*args, **others)
        self.reset_positions = reset_positions
        self.rotary_pos_emb = _Rotary(self.rotary_pos_emb)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **others: Any) -> Any:
        self.rotary_pos_emb.documents = attention_mask if self.reset_positions else None
        return super().forward(hidden_states, attention_mask, **others)
