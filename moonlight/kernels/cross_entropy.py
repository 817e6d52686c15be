"""One chunk of rows of a cross-entropy whose vocabulary may be spread over tensor-parallel ranks.

Each rank has a range of the vocabulary. From the `partial_sums` of all, the logarithm of a row's whole sum is
log(sum over ranks of sum * exp(maximum - largest maximum)) + largest maximum. The loss is that minus the label's logit,
which exactly one rank has. `loss_gradient_` then turns each rank's logits into their gradient where they lie.
"""

from __future__ import annotations  # kernels name `tl.constexpr`, which is not there without Triton

import math

import torch

from moonlight.kernels.blocks import float_block, row_blocks, store
from moonlight.kernels.jit import jit, tl, triton

SUM_COLUMNS, GRADIENT_COLUMNS, NUM_WARPS = 4096, 4096, 8

Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def partial_sums(logits: torch.Tensor, labels: torch.Tensor, start: int) -> Sums:
    """(maximum, sum of exp(logit - maximum), logit of the label or 0), each float32 [rows].

    `logits` float32 or bfloat16 [rows, local vocabulary], contiguous, of the ids from `start`; `labels` int64 [rows],
    of the whole vocabulary, or any other number for a row that does not count: its label's logit is 0 everywhere.
    """
    return (partial_sums_triton if logits.is_cuda else partial_sums_torch)(logits, labels, start)


def loss_gradient_(
    logits: torch.Tensor, labels: torch.Tensor, start: int, log_sum_exp: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Overwrite `logits` by (exp(logits - log_sum_exp) - onehot) * scale, in their dtype, and return them.

    Arguments as in `partial_sums`; `log_sum_exp` and `scale` float32 [rows], over the whole vocabulary; the scale of
    rows that do not count is 0.
    """
    function = loss_gradient_triton_ if logits.is_cuda else loss_gradient_torch_
    return function(logits, labels, start, log_sum_exp, scale)


def loss_and_gradient_(logits: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Overwrite `logits` as `loss_gradient_` does, for a vocabulary that is here as a whole; returns float32 losses.

    On a CPU one pass over the logits, and one exponential, do what takes `partial_sums` and `loss_gradient_` two.
    """
    if not logits.is_cuda:
        return _loss_and_gradient_torch_(logits, labels, scale)
    maximum, total, of_label = partial_sums(logits, labels, 0)
    log_sum_exp = maximum + total.log()
    loss_gradient_(logits, labels, 0, log_sum_exp, scale)
    return log_sum_exp - of_label


def _loss_and_gradient_torch_(logits: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    rows, width = logits.shape
    column, here = _local(labels, 0, width)
    losses = torch.where(here, logits.gather(1, column).float(), 0.0)[:, 0].neg_()
    onehot = torch.where(here, -scale[:, None], 0.0)
    for block in row_blocks(rows, width):
        values = float_block(logits, block)
        maximum = logits[block].amax(1, keepdim=True).float()
        torch.sub(logits[block], maximum, out=values)
        total = _exp_(values).sum(1, keepdim=True)
        values.mul_(scale[block, None] / total).scatter_add_(1, column[block], onehot[block])
        losses[block] += (total.log_() + maximum)[:, 0]
        store(logits, block, values)
    return losses


def _exp_(x: torch.Tensor) -> torch.Tensor:
    # Three times as fast as torch's exp on a CPU. The product costs |x| roundings, where exp(x) is small.
    return x.mul_(math.log2(math.e)).exp2_()


def _local(labels: torch.Tensor, start: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The column of each row's label, 0 if it is elsewhere, and whether it is here."""
    column = labels - start
    here = (column >= 0) & (column < width)
    return torch.where(here, column, 0)[:, None], here[:, None]


def partial_sums_torch(logits: torch.Tensor, labels: torch.Tensor, start: int) -> Sums:
    """The twin of `partial_sums_triton`."""
    rows, width = logits.shape
    maximum, total = (torch.empty(rows, device=logits.device) for _ in range(2))
    for block in row_blocks(rows, width):
        values = logits[block].float()
        torch.amax(values, 1, out=maximum[block])
        torch.sum(_exp_(values - maximum[block, None]), 1, out=total[block])
    column, here = _local(labels, start, width)
    return maximum, total, torch.where(here, logits.gather(1, column).float(), 0.0)[:, 0]


def loss_gradient_torch_(
    logits: torch.Tensor, labels: torch.Tensor, start: int, log_sum_exp: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The twin of `loss_gradient_triton_`."""
    rows, width = logits.shape
    column, here = _local(labels, start, width)
    onehot = here.float().neg_()
    for block in row_blocks(rows, width):
        values = float_block(logits, block)
        torch.sub(logits[block], log_sum_exp[block, None], out=values)
        _exp_(values).scatter_add_(1, column[block], onehot[block]).mul_(scale[block, None])
        store(logits, block, values)
    return logits


def partial_sums_triton(logits: torch.Tensor, labels: torch.Tensor, start: int) -> Sums:
    """One pass over the logits, a program for each row."""
    rows, width = logits.shape
    assert logits.is_contiguous(), logits.stride()
    maximum, total, label_logit = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    columns = min(SUM_COLUMNS, triton.next_power_of_2(width))
    with torch.cuda.device_of(logits):
        _partial_sums[(rows,)](
            logits, labels.contiguous(), maximum, total, label_logit, start, width, columns, num_warps=NUM_WARPS
        )
    return maximum, total, label_logit


def loss_gradient_triton_(
    logits: torch.Tensor, labels: torch.Tensor, start: int, log_sum_exp: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """One pass: reads the logits, writes their gradient there."""
    rows, width = logits.shape
    assert logits.is_contiguous(), logits.stride()
    columns = min(GRADIENT_COLUMNS, triton.next_power_of_2(width))
    with torch.cuda.device_of(logits):
        _loss_gradient[(rows, triton.cdiv(width, columns))](
            logits,
            labels.contiguous(),
            log_sum_exp.contiguous(),
            scale.contiguous(),
            start,
            width,
            columns,
            num_warps=NUM_WARPS,
        )
    return logits


@jit
def _partial_sums(logits, labels, maximum, total, label_logit, start, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    columns = tl.arange(0, COLUMNS)
    highest = tl.full([], float("-inf"), tl.float32)
    sums = tl.zeros([COLUMNS], tl.float32)  # of every lane by itself, brought together at the end
    for begin in range(0, width, COLUMNS):
        here = begin + columns < width
        values = tl.load(logits + begin + columns, here, float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(values, 0))
        # While there was nothing but -inf, 0 is subtracted: -inf - -inf is not a number.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.exp(highest - shift) + tl.exp(values - shift)
        highest = higher
    tl.store(maximum + row, highest)
    tl.store(total + row, tl.sum(sums, 0))
    column = tl.load(labels + row) - start
    here = (column >= 0) & (column < width)
    tl.store(label_logit + row, tl.load(logits + column, here, 0.0).to(tl.float32))


@jit
def _loss_gradient(logits, labels, log_sum_exp, scale, start, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < width
    at = logits + row * width + column
    values = tl.load(at, here, float("-inf")).to(tl.float32)
    values = tl.exp(values - tl.load(log_sum_exp + row))
    values = tl.where(column == tl.load(labels + row) - start, values - 1.0, values)
    tl.store(at, values * tl.load(scale + row), here)
