"""Megatron's GPTModel with our pass through a layer and our loss."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.transformer_layer import TransformerLayer

from moonlight.model.loss import LinearCrossEntropy
from moonlight.model.recompute import recompute_in_backward

NOT_HERE = ("context", "packed_seq_params", "inference_context", "inference_params", "sequence_len_offset")
"""What Megatron's block may hand to a layer of other models."""


class MoonlightLayer(TransformerLayer):
    """Attention and feed-forward, each behind a norm and beside a residual connection."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any
    ) -> tuple[torch.Tensor, None]:
        """[sequence / TP, batch, hidden] to the same; `attention_mask` is the number of each token's document."""
        assert all(others[name] is None for name in NOT_HERE if name in others), others
        if "layer" in self.config.recompute_modules and torch.is_grad_enabled():
            # The first time without gradients, in which routers and attention count nothing.
            return checkpoint(self._once, False, hidden_states, attention_mask), None
        return self._once(hidden_states, attention_mask), None

    def _once(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attention(normed, attention_mask)
        total, normed_total = self.pre_mlp_layernorm.add(hidden_states, attended)
        fed, _ = self.mlp(normed_total)
        if "layernorm" in self.config.recompute_modules:
            recompute_in_backward([normed], lambda: [self.input_layernorm(hidden_states)], attended)
            recompute_in_backward([normed_total], lambda: [self.pre_mlp_layernorm(total)], fed)
        return total + fed


class LossHead(ColumnParallelLinear):
    """Logits of hidden states [sequence / TP, batch, hidden]; with labels, their loss instead."""

    def forward(
        self, hidden: torch.Tensor, weight: torch.Tensor | None = None, *others: Any, **named: Any
    ) -> tuple[torch.Tensor, None]:
        """With `labels` and `loss_mask` [batch, sequence]: the sum of losses times `loss_mask`, a float32 scalar."""
        labels, scale = named.pop("labels", None), named.pop("loss_mask", None)
        if labels is None:
            return super().forward(hidden, weight, *others, **named)
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        weight = self.weight if weight is None else weight
        hidden, labels, scale = (x.flatten(0, 1) for x in (hidden, labels.T, scale.T))
        learns = torch.is_grad_enabled()
        return LinearCrossEntropy.apply(hidden, weight, labels, scale, self.tp_group, learns), None


class LanguageModel(GPTModel):
    """`model(tokens, positions, documents)` gives logits [batch, sequence, vocabulary] on the last stage.

    With `labels` and `loss_mask` [batch, sequence] it gives the sum of losses times `loss_mask`, and logits are never
    there as a whole.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        if self.post_process:
            self.output_layer.__class__ = LossHead

    def _postprocess(self, hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
        if not self.post_process or named["labels"] is None:
            return super()._postprocess(hidden_states, **named)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        given = {"labels": named["labels"], "loss_mask": named["loss_mask"]}
        loss, _ = self.output_layer(hidden_states, weight=weight, **given)
        return loss
