"""The head and its cross-entropy in one, a chunk of tokens at a time: all logits are never there."""

from typing import Any

import torch
import torch.distributed as dist

from moonlight.kernels.blocks import add_
from moonlight.kernels.chunk_sizes import logits_chunk_rows
from moonlight.kernels.cross_entropy import loss_and_gradient_, loss_gradient_, partial_sums


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of `scale` times the cross-entropy of head(hidden) against the label: a float32 scalar.

    `hidden` [tokens, hidden], on every rank of `group` alike; `weight` [vocabulary of this rank, hidden], rank r of the
    group having the r-th part; `labels` int64 and `scale` float32 [tokens]. The gradients are made with the loss, while
    a chunk's logits are there, and multiplied by that of the loss in the backward pass; the gradient of `hidden` is
    this rank's part of a sum over the group. Without `learns` there are none: a function like this one is not told
    whether gradients are wanted.

    Logits have the dtype of `hidden`; everything between them and their gradient is float32, and so is the sum of the
    weight's gradient over chunks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        scale: torch.Tensor,
        group: dist.ProcessGroup,
        learns: bool,
    ) -> torch.Tensor:
        tokens, first = len(hidden), group.rank() * len(weight)
        rows = logits_chunk_rows(len(weight))
        buffer = hidden.new_empty(min(rows, tokens), len(weight))
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if learns else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if learns else None
        for start in range(0, tokens, rows):
            chunk = slice(start, start + rows)
            logits = torch.mm(hidden[chunk], weight.T, out=buffer[: tokens - start])
            if learns and group.size() == 1:
                losses = loss_and_gradient_(logits, labels[chunk], scale[chunk])
            else:
                log_sum_exp, of_label = _whole(*partial_sums(logits, labels[chunk], first), group)
                losses = log_sum_exp - of_label
                if learns:
                    loss_gradient_(logits, labels[chunk], first, log_sum_exp, scale[chunk])
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


def _whole(
    maximum: torch.Tensor, total: torch.Tensor, of_label: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """log(sum(exp(logits))) over the whole vocabulary and the label's logit, of the ranks' parts: float32 [tokens]."""
    if group.size() > 1:
        own = maximum.clone()
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        sums = torch.stack([total * (own - maximum).exp(), of_label])
        dist.all_reduce(sums, group=group)
        total, of_label = sums.unbind()
    return maximum + total.log(), of_label
