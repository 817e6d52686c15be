"""Cross-entropy of one chunk of rows. The vocabulary may be sharded over tensor-parallel ranks.

Each rank has a range of the vocabulary. From the `partial_sums` of all ranks, the log-sum-exp of a row is
log(sum over ranks of sum * exp(maximum - largest maximum)) + largest maximum. The loss is the log-sum-exp minus the
label's logit, which exactly one rank has. `loss_gradient_` then overwrites each rank's logits by their gradient.
"""

from __future__ import annotations  # kernels use `tl.constexpr`, which does not exist without Triton

import math

import torch
from torch import Tensor

from moonlight.kernels.blocks import float_block, row_blocks, store
from moonlight.kernels.jit import jit, tl, triton

SUM_COLUMNS, GRADIENT_COLUMNS, NUM_WARPS = 4096, 4096, 8

Sums = tuple[Tensor, Tensor, Tensor]


def partial_sums(logits: Tensor, labels: Tensor, start: int) -> Sums:
    """Return (maximum, sum of exp(logit - maximum), logit of the label or 0), each float32 [rows].

    Args:
        logits: float32 or bfloat16 [rows, local vocabulary], contiguous, of the ids from `start`.
        labels: int64 [rows], of the full vocabulary. Any other number marks a row that does not count: its label's
            logit is 0 on all ranks.
    """
    return (partial_sums_triton if logits.is_cuda else partial_sums_torch)(logits, labels, start)


def loss_gradient_(logits: Tensor, labels: Tensor, start: int, log_sum_exp: Tensor, scale: Tensor) -> Tensor:
    """Overwrite `logits` by (exp(logits - log_sum_exp) - onehot) * scale, in their dtype, and return them.

    Arguments are those of `partial_sums`. `log_sum_exp` and `scale` are float32 [rows], over the full vocabulary; the
    scale of rows that do not count is 0.
    """
    function = loss_gradient_triton_ if logits.is_cuda else loss_gradient_torch_
    return function(logits, labels, start, log_sum_exp, scale)


def loss_and_gradient_(logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Overwrite `logits` as `loss_gradient_` does, for an unsharded vocabulary, and return float32 losses [rows].

    On a CPU, this takes one pass over the logits and one exponential; `partial_sums` and `loss_gradient_` take two.
    """
    if not logits.is_cuda:
        return _loss_and_gradient_torch_(logits, labels, scale)
    maximum, total, label_logit = partial_sums(logits, labels, 0)
    log_sum_exp = maximum + total.log()
    loss_gradient_(logits, labels, 0, log_sum_exp, scale)
    return log_sum_exp - label_logit


def _loss_and_gradient_torch_(logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    rows, width = logits.shape
    column, is_local = _local(labels, 0, width)
    losses = torch.where(is_local, logits.gather(1, column).float(), 0.0)[:, 0].neg_()
    onehot = torch.where(is_local, -scale[:, None], 0.0)
    for block in row_blocks(rows, width):
        values = float_block(logits, block)
        maximum = logits[block].amax(1, keepdim=True).float()
        torch.sub(logits[block], maximum, out=values)
        total = _exp_(values).sum(1, keepdim=True)
        values.mul_(scale[block, None] / total).scatter_add_(1, column[block], onehot[block])
        losses[block] += (total.log_() + maximum)[:, 0]
        store(logits, block, values)
    return losses


def _exp_(x: Tensor) -> Tensor:
    # Three times as fast as torch's exp on a CPU. The product adds |x| rounding errors, but exp(x) is small there.
    return x.mul_(math.log2(math.e)).exp2_()


def _local(labels: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the column of each row's label, or 0 if another rank has it, and a mask of the labels on this rank."""
    column = labels - start
    is_local = (column >= 0) & (column < width)
    return torch.where(is_local, column, 0)[:, None], is_local[:, None]


def partial_sums_torch(logits: Tensor, labels: Tensor, start: int) -> Sums:
    """Reference of `partial_sums_triton`."""
    rows, width = logits.shape
    maximum, total = (torch.empty(rows, device=logits.device) for _ in range(2))
    for block in row_blocks(rows, width):
        values = logits[block].float()
        torch.amax(values, 1, out=maximum[block])
        torch.sum(_exp_(values - maximum[block, None]), 1, out=total[block])
    column, is_local = _local(labels, start, width)
    return maximum, total, torch.where(is_local, logits.gather(1, column).float(), 0.0)[:, 0]


def loss_gradient_torch_(logits: Tensor, labels: Tensor, start: int, log_sum_exp: Tensor, scale: Tensor) -> Tensor:
    """Reference of `loss_gradient_triton_`."""
    rows, width = logits.shape
    column, is_local = _local(labels, start, width)
    onehot = is_local.float().neg_()
    for block in row_blocks(rows, width):
        values = float_block(logits, block)
        torch.sub(logits[block], log_sum_exp[block, None], out=values)
        _exp_(values).scatter_add_(1, column[block], onehot[block]).mul_(scale[block, None])
        store(logits, block, values)
    return logits


def partial_sums_triton(logits: Tensor, labels: Tensor, start: int) -> Sums:
    """Make one pass over the logits, with one program per row."""
    rows, width = logits.shape
    assert logits.is_contiguous(), logits.stride()
    maximum, total, label_logit = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    columns = min(SUM_COLUMNS, triton.next_power_of_2(width))
    with torch.cuda.device_of(logits):
        _partial_sums[(rows,)](
            logits, labels.contiguous(), maximum, total, label_logit, start, width, columns, num_warps=NUM_WARPS
        )
    return maximum, total, label_logit


def loss_gradient_triton_(logits: Tensor, labels: Tensor, start: int, log_sum_exp: Tensor, scale: Tensor) -> Tensor:
    """Make one pass: read the logits and overwrite them by their gradient."""
    rows, width = logits.shape
    assert logits.is_contiguous(), logits.stride()
    columns = min(GRADIENT_COLUMNS, triton.next_power_of_2(width))
    with torch.cuda.device_of(logits):
        _loss_gradient[(rows, triton.cdiv(width, columns))](
            logits, labels.contiguous(), log_sum_exp.contiguous(), scale.contiguous(), start, width, columns,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return logits


@jit
def _partial_sums(logits, labels, maximum, total, label_logit, start, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    columns = tl.arange(0, COLUMNS)
    highest = tl.full([], float("-inf"), tl.float32)
    sums = tl.zeros([COLUMNS], tl.float32)  # one sum per lane, added at the end
    for start_column in range(0, width, COLUMNS):
        mask = start_column + columns < width
        values = tl.load(logits + start_column + columns, mask, float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(values, 0))
        # If all values so far are -inf, subtract 0: -inf - -inf is NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.exp(highest - shift) + tl.exp(values - shift)
        highest = higher
    tl.store(maximum + row, highest)
    tl.store(total + row, tl.sum(sums, 0))
    column = tl.load(labels + row) - start
    is_local = (column >= 0) & (column < width)
    tl.store(label_logit + row, tl.load(logits + column, is_local, 0.0).to(tl.float32))


@jit
def _loss_gradient(logits, labels, log_sum_exp, scale, start, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < width
    pointers = logits + row * width + column
    values = tl.load(pointers, mask, float("-inf")).to(tl.float32)
    values = tl.exp(values - tl.load(log_sum_exp + row))
    values = tl.where(column == tl.load(labels + row) - start, values - 1.0, values)
    tl.store(pointers, values * tl.load(scale + row), mask)
