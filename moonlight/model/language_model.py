"""Megatron's GPTModel with our forward pass of a layer and our loss."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.transformer_layer import TransformerLayer

from moonlight.model.loss import LinearCrossEntropy
from moonlight.model.recompute import recompute_in_backward

UNSUPPORTED_ARGUMENTS = ("context", "packed_seq_params", "inference_context", "inference_params", "sequence_len_offset")
"""Arguments that Megatron's transformer block may pass to a layer; here each must be None or absent."""


class MoonlightLayer(TransformerLayer):
    """Attention and feed-forward, each after a norm and with a residual connection."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """Return the output of the layer, [sequence / TP, batch, hidden] as `hidden_states`, and None.

        `attention_mask` is the document id of each token, [batch, sequence].
        """
        assert all(kwargs[name] is None for name in UNSUPPORTED_ARGUMENTS if name in kwargs), kwargs
        if "layer" in self.config.recompute_modules and torch.is_grad_enabled():
            # The first pass runs without gradients, so routers and attention record nothing in it.
            return checkpoint(self._forward_layer, False, hidden_states, attention_mask), None
        return self._forward_layer(hidden_states, attention_mask), None

    def _forward_layer(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attention(normed, attention_mask)
        total, normed_total = self.pre_mlp_layernorm.add(hidden_states, attended)
        fed, _ = self.mlp(normed_total)
        if "layernorm" in self.config.recompute_modules:
            recompute_in_backward([normed], lambda: [self.input_layernorm(hidden_states)], attended)
            recompute_in_backward([normed_total], lambda: [self.pre_mlp_layernorm(total)], fed)
        return total + fed


class LossHead(ColumnParallelLinear):
    """Output layer: logits of hidden states [sequence / TP, batch, hidden], or their loss if labels are passed."""

    def forward(
        self, hidden: torch.Tensor, weight: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """Return logits; with `labels` and `loss_mask`, the sum of losses * `loss_mask`, a float32 scalar.

        `labels` (int64) and `loss_mask` (float32) are [batch, sequence].
        """
        labels, scale = kwargs.pop("labels", None), kwargs.pop("loss_mask", None)
        if labels is None:
            return super().forward(hidden, weight, *args, **kwargs)
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        weight = self.weight if weight is None else weight
        hidden, labels, scale = (x.flatten(0, 1) for x in (hidden, labels.T, scale.T))
        needs_grad = torch.is_grad_enabled()
        return LinearCrossEntropy.apply(hidden, weight, labels, scale, self.tp_group, needs_grad), None


class LanguageModel(GPTModel):
    """A chunk of the model. `model(tokens, positions, document_ids)` takes integers, [batch, sequence] each.

    The last stage returns logits [batch, sequence, vocabulary / TP]. With `labels` and `loss_mask` [batch, sequence] it
    returns the sum of losses * `loss_mask`, a float32 scalar, and the full logits are never materialized. Other stages
    return hidden states.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.output_layer.__class__ = LossHead

    def _postprocess(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if not self.post_process or kwargs["labels"] is None:
            return super()._postprocess(hidden_states, **kwargs)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        targets = {"labels": kwargs["labels"], "loss_mask": kwargs["loss_mask"]}
        loss, _ = self.output_layer(hidden_states, weight=weight, **targets)
        return loss
