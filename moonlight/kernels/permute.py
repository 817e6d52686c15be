"""Permutation of tokens by expert, and back.

A token routed to k experts has k copies, numbered token by token. `source` is the token at each sorted position, and
`inverse` is the sorted position of each copy. `permute_tokens` and `unpermute_tokens` are adjoint, so each is the
other's backward pass.
"""

from __future__ import annotations  # kernels use `tl.constexpr`, which does not exist without Triton

import torch
import torch.nn.functional as F

from moonlight.kernels.blocks import dense_rows
from moonlight.kernels.jit import jit, tl, triton

ROWS, COLUMNS, NUM_WARPS = 4, 512, 4
SORT_ELEMENTS = 8192
"""Copies x experts per program of the sort."""

ExpertPermutation = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""(source, inverse, ends) as in `sort_by_expert`."""


def sort_by_expert(chosen: torch.Tensor, num_experts: int) -> ExpertPermutation:
    """Sort the copies of tokens by expert, stably. The host never waits for the device.

    Args:
        chosen: int64 [tokens, k], the experts of each token, less than `num_experts`.

    Returns:
        source: int64 [tokens * k], the token at each position.
        inverse: int64 [tokens, k], the position of each copy.
        ends: int32 [num_experts], the end of each expert's segment.
    """
    return (sort_by_expert_triton if chosen.is_cuda else sort_by_expert_torch)(chosen, num_experts)


def pad_expert_segments(order: ExpertPermutation, chosen: torch.Tensor, alignment: int) -> ExpertPermutation:
    """Return the same order with every expert's segment padded to a multiple of `alignment`.

    `source` becomes [tokens * k + experts * (alignment - 1)]. Its padding, and the positions after the last segment,
    contain token 0: give their results a weight of 0.
    """
    _, inverse, ends = order
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    gaps = (-counts).remainder(alignment)
    shifts = gaps.cumsum(0)
    inverse = inverse + (shifts - gaps)[chosen]
    tokens, k = chosen.shape
    source = inverse.new_zeros(tokens * k + len(ends) * (alignment - 1))
    copies = torch.arange(tokens, device=source.device).repeat_interleave(k)
    return source.scatter_(0, inverse.flatten(), copies), inverse, (ends + shifts).to(torch.int32)


def permute_tokens(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Return the rows of `x` [tokens, hidden] in the order of `source` int64 [copies]: [copies, hidden]."""
    return (permute_tokens_triton if x.is_cuda else permute_tokens_torch)(x, source)


def unpermute_tokens(y: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return the sum of the k rows of each token, [tokens, hidden].

    `y` is [tokens * k, hidden], `inverse` int64 [tokens, k]. The sum is float32 in the order of k and rounded once, so
    it is deterministic.
    """
    return (unpermute_tokens_triton if y.is_cuda else unpermute_tokens_torch)(y, inverse)


def sort_by_expert_torch(chosen: torch.Tensor, num_experts: int) -> ExpertPermutation:
    """Reference of `sort_by_expert_triton`."""
    experts, order = torch.sort(chosen.flatten().to(torch.int32), stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    every = torch.arange(num_experts, device=order.device, dtype=torch.int32)
    ends = torch.searchsorted(experts, every, right=True, out_int32=True)
    source = order.div_(chosen.shape[1], rounding_mode="floor")
    return source, inverse.view(chosen.shape), ends


def permute_tokens_torch(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Reference of `permute_tokens_triton`."""
    return x.index_select(0, source)


def unpermute_tokens_torch(y: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Reference of `unpermute_tokens_triton`: an embedding bag sums rows in float32 without a gather first."""
    return F.embedding_bag(inverse, y, mode="sum")


def sort_by_expert_triton(chosen: torch.Tensor, num_experts: int) -> ExpertPermutation:
    """Counting sort: each program counts its copies by expert, and places them after those of all earlier programs."""
    copies = chosen.numel()
    width = triton.next_power_of_2(num_experts)
    block = max(16, SORT_ELEMENTS // width)
    blocks = triton.cdiv(copies, block)
    chosen = chosen.contiguous()
    counts = torch.empty(num_experts, blocks, dtype=torch.int32, device=chosen.device)
    with torch.cuda.device_of(chosen):
        _count[(blocks,)](chosen, counts, copies, num_experts, blocks, block, width)
    block_ends = counts.flatten().cumsum(0, dtype=torch.int32).view(num_experts, blocks)
    source = torch.empty(copies, dtype=torch.int64, device=chosen.device)
    inverse = torch.empty_like(chosen)
    with torch.cuda.device_of(chosen):
        _place[(blocks,)](
            chosen, counts, block_ends, source, inverse, copies, num_experts, blocks, chosen.shape[1], block, width
        )
    ends = block_ends[:, -1].contiguous() if blocks else counts.sum(1, dtype=torch.int32)
    return source, inverse, ends


def permute_tokens_triton(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Make one pass: read a row for each of its copies, and write each copy once."""
    x = dense_rows(x)
    rows, width = len(source), x.shape[1]
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))
    with torch.cuda.device_of(x):
        _gather[grid](x, source.contiguous(), out, rows, width, x.stride(0), ROWS, COLUMNS, num_warps=NUM_WARPS)
    return out


def unpermute_tokens_triton(y: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Make one pass: read every row once, and write every sum once."""
    y, inverse = dense_rows(y), inverse.contiguous()
    tokens, width = len(inverse), y.shape[1]
    out = torch.empty(tokens, width, dtype=y.dtype, device=y.device)
    grid = (triton.cdiv(tokens, ROWS), triton.cdiv(width, COLUMNS))
    with torch.cuda.device_of(y):
        _combine[grid](
            y, inverse, out, tokens, width, y.stride(0), inverse.shape[1], ROWS, COLUMNS, num_warps=NUM_WARPS
        )
    return out


@jit
def _count(chosen, counts, copies, num_experts, blocks, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    copy = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(chosen + copy, copy < copies, -1)
    all_experts = tl.arange(0, WIDTH)
    count = tl.sum((expert[:, None] == all_experts[None, :]).to(tl.int32), 0)
    tl.store(counts + all_experts * blocks + tl.program_id(0), count, all_experts < num_experts)


@jit
def _place(
    chosen, counts, block_ends, source, inverse, copies, num_experts, blocks, k,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    copy = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(chosen + copy, copy < copies, -1)
    all_experts = tl.arange(0, WIDTH)
    is_chosen = (expert[:, None] == all_experts[None, :]).to(tl.int32)
    # Start of this block's copies of each expert: `block_ends` includes them.
    offset, mask = all_experts * blocks + tl.program_id(0), all_experts < num_experts
    start = tl.load(block_ends + offset, mask, 0) - tl.load(counts + offset, mask, 0)
    position = tl.sum(is_chosen * (start[None, :] + tl.cumsum(is_chosen, 0) - 1), 1).to(tl.int64)
    tl.store(inverse + copy, position, copy < copies)
    tl.store(source + position, (copy // k).to(tl.int64), copy < copies)


@jit
def _gather(x, source, out, rows, width, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows)[:, None] & (column < width)
    token = tl.load(source + row, row < rows, 0)[:, None]
    values = tl.load(x + token * x_stride + column, mask)
    tl.store(out + row[:, None] * width + column, values, mask)


@jit
def _combine(y, inverse, out, tokens, width, y_stride, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (token < tokens)[:, None] & (column < width)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for j in tl.static_range(K):
        position = tl.load(inverse + token * K + j, token < tokens, 0)[:, None]
        total += tl.load(y + position * y_stride + column, mask, 0.0).to(tl.float32)
    tl.store(out + token[:, None] * width + column, total, mask)
