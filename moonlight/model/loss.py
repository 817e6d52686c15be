"""Fused output projection and cross-entropy, one chunk of tokens at a time: the full logits are never materialized."""

from typing import Any

import torch
import torch.distributed as dist

from moonlight.kernels.blocks import add_
from moonlight.kernels.chunk_sizes import logits_chunk_rows
from moonlight.kernels.cross_entropy import loss_and_gradient_, loss_gradient_, partial_sums


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of `scale` times the cross-entropy of head(hidden) against the label: a float32 scalar.

    Inputs: `hidden` [tokens, hidden], equal on all ranks of `group`; `weight` [local vocabulary, hidden], where rank r
    of the group holds the r-th shard; `labels` int64 and `scale` float32 [tokens].

    The forward pass computes the gradients together with the loss, while the logits of a chunk are in memory. The
    backward pass multiplies them by the gradient of the loss. The gradient of `hidden` is this rank's term of a sum
    over the group. Without `needs_grad` the gradients are not computed. It is an argument because grad mode is off
    inside an autograd function.

    Logits have the dtype of `hidden`. The loss and the gradient of the logits are computed in float32, and the gradient
    of the weight is summed over chunks in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        scale: torch.Tensor,
        group: dist.ProcessGroup,
        needs_grad: bool,
    ) -> torch.Tensor:
        tokens, start_id = len(hidden), group.rank() * len(weight)
        rows = logits_chunk_rows(len(weight))
        buffer = hidden.new_empty(min(rows, tokens), len(weight))
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        for start in range(0, tokens, rows):
            chunk = slice(start, start + rows)
            logits = torch.mm(hidden[chunk], weight.T, out=buffer[: tokens - start])
            if needs_grad and group.size() == 1:
                losses = loss_and_gradient_(logits, labels[chunk], scale[chunk])
            else:
                log_sum_exp, label_logits = _reduce_partial_sums(*partial_sums(logits, labels[chunk], start_id), group)
                losses = log_sum_exp - label_logits
                if needs_grad:
                    loss_gradient_(logits, labels[chunk], start_id, log_sum_exp, scale[chunk])
            loss += torch.dot(losses, scale[chunk])
            if grad_hidden is not None and grad_weight is not None:
                torch.mm(logits, weight, out=grad_hidden[chunk])
                if grad_weight.dtype == logits.dtype:
                    grad_weight.addmm_(logits.T, hidden[chunk])
                else:
                    add_(grad_weight, logits.T @ hidden[chunk])
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None, None, None, None


def _reduce_partial_sums(
    maximum: torch.Tensor, total: torch.Tensor, label_logits: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log(sum(exp(logits))) over the full vocabulary and the logits of the labels: float32 [tokens] each."""
    if group.size() > 1:
        local_maximum = maximum.clone()
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        sums = torch.stack([total * (local_maximum - maximum).exp(), label_logits])
        dist.all_reduce(sums, group=group)
        total, label_logits = sums.unbind()
    return maximum + total.log(), label_logits
