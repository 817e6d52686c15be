"""Sort tokens by expert, and back.

A token that goes to k experts has k copies, numbered token by token. `source` is the token at each sorted position;
`inverse` is the sorted position of each copy. `permute_tokens` and `unpermute_tokens` are each other's adjoint,
so each is the other's backward pass.
"""

from __future__ import annotations  # kernels name `tl.constexpr`, which is not there without Triton

import torch
import torch.nn.functional as F

from moonlight.kernels.blocks import dense_rows
from moonlight.kernels.jit import jit, tl, triton

ROWS, COLUMNS, NUM_WARPS = 4, 512, 4
SORT_ELEMENTS = 8192
"""Copies x experts that one program of the sort holds."""

ExpertPermutation = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def sort_by_expert(chosen: torch.Tensor, num_experts: int) -> ExpertPermutation:
    """Sort the copies of tokens by expert, stably: (source, inverse, ends).

    `chosen` int64 [tokens, k], below `num_experts`. Returns source int64 [tokens * k]: the token at each place; inverse
    int64 [tokens, k]: the place of each copy; ends int32 [num_experts]: where each expert's run ends. The host never
    waits for the device.
    """
    return (sort_by_expert_triton if chosen.is_cuda else sort_by_expert_torch)(chosen, num_experts)


def pad_expert_segments(order: ExpertPermutation, chosen: torch.Tensor, alignment: int) -> ExpertPermutation:
    """The same order with every expert's run beginning at a multiple of `alignment`.

    `source` [tokens * k + experts * (alignment - 1)] then has gaps, which name token 0: what is made of them must not
    count, so they want a weight of 0. Its last places lie past every run.
    """
    _, inverse, ends = order
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    gaps = (-counts).remainder(alignment)
    moved = gaps.cumsum(0)
    inverse = inverse + (moved - gaps)[chosen]
    tokens, k = chosen.shape
    source = inverse.new_zeros(tokens * k + len(ends) * (alignment - 1))
    of_copies = torch.arange(tokens, device=source.device).repeat_interleave(k)
    return source.scatter_(0, inverse.flatten(), of_copies), inverse, (ends + moved).to(torch.int32)


def permute_tokens(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Rows of `x` [tokens, hidden] in the order of `source` int64 [copies]: [copies, hidden]."""
    return (permute_tokens_triton if x.is_cuda else permute_tokens_torch)(x, source)


def unpermute_tokens(y: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Sum of the k rows of each token: `y` [tokens * k, hidden], `inverse` int64 [tokens, k] -> [tokens, hidden].

    Summed in float32 in the order of k and rounded once, so the same bits every time.
    """
    return (unpermute_tokens_triton if y.is_cuda else unpermute_tokens_torch)(y, inverse)


def sort_by_expert_torch(chosen: torch.Tensor, num_experts: int) -> ExpertPermutation:
    """The twin of `sort_by_expert_triton`."""
    experts, order = torch.sort(chosen.flatten().to(torch.int32), stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    every = torch.arange(num_experts, device=order.device, dtype=torch.int32)
    ends = torch.searchsorted(experts, every, right=True, out_int32=True)
    source = order.div_(chosen.shape[1], rounding_mode="floor")
    return source, inverse.view(chosen.shape), ends


def permute_tokens_torch(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """The twin of `permute_tokens_triton`."""
    return x.index_select(0, source)


def unpermute_tokens_torch(y: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """The twin of `unpermute_tokens_triton`: an embedding bag sums rows in float32 without gathering them first."""
    return F.embedding_bag(inverse, y, mode="sum")


def sort_by_expert_triton(chosen: torch.Tensor, num_experts: int) -> ExpertPermutation:
    """A counting sort: each program counts its copies by expert, and places them after those of all before it."""
    copies = chosen.numel()
    width = triton.next_power_of_2(num_experts)
    block = max(16, SORT_ELEMENTS // width)
    blocks = triton.cdiv(copies, block)
    chosen = chosen.contiguous()
    counts = torch.empty(num_experts, blocks, dtype=torch.int32, device=chosen.device)
    with torch.cuda.device_of(chosen):
        _count[(blocks,)](chosen, counts, copies, num_experts, blocks, block, width)
    counted = counts.flatten().cumsum(0, dtype=torch.int32).view(num_experts, blocks)
    source = torch.empty(copies, dtype=torch.int64, device=chosen.device)
    inverse = torch.empty_like(chosen)
    with torch.cuda.device_of(chosen):
        _place[(blocks,)](
            chosen, counts, counted, source, inverse, copies, num_experts, blocks, chosen.shape[1], block, width
        )
    ends = counted[:, -1].contiguous() if blocks else counts.sum(1, dtype=torch.int32)
    return source, inverse, ends


def permute_tokens_triton(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Reads each row as often as it is named, and writes once."""
    x = dense_rows(x)
    rows, width = len(source), x.shape[1]
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))
    with torch.cuda.device_of(x):
        _gather[grid](x, source.contiguous(), out, rows, width, x.stride(0), ROWS, COLUMNS, num_warps=NUM_WARPS)
    return out


def unpermute_tokens_triton(y: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Reads every row once, and writes every sum once."""
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
    every = tl.arange(0, WIDTH)
    count = tl.sum((expert[:, None] == every[None, :]).to(tl.int32), 0)
    tl.store(counts + every * blocks + tl.program_id(0), count, every < num_experts)


@jit
def _place(
    chosen,
    counts,
    counted,
    source,
    inverse,
    copies,
    num_experts,
    blocks,
    k,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    copy = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(chosen + copy, copy < copies, -1)
    every = tl.arange(0, WIDTH)
    own = (expert[:, None] == every[None, :]).to(tl.int32)
    # Where this block's copies of each expert begin: `counted` includes its own.
    at, there = every * blocks + tl.program_id(0), every < num_experts
    begin = tl.load(counted + at, there, 0) - tl.load(counts + at, there, 0)
    place = tl.sum(own * (begin[None, :] + tl.cumsum(own, 0) - 1), 1).to(tl.int64)
    tl.store(inverse + copy, place, copy < copies)
    tl.store(source + place, (copy // k).to(tl.int64), copy < copies)


@jit
def _gather(x, source, out, rows, width, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    here = (row < rows)[:, None] & (column < width)
    token = tl.load(source + row, row < rows, 0)[:, None]
    values = tl.load(x + token * x_stride + column, here)
    tl.store(out + row[:, None] * width + column, values, here)


@jit
def _combine(y, inverse, out, tokens, width, y_stride, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    here = (token < tokens)[:, None] & (column < width)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for j in tl.static_range(K):
        place = tl.load(inverse + token * K + j, token < tokens, 0)[:, None]
        total += tl.load(y + place * y_stride + column, here, 0.0).to(tl.float32)
    tl.store(out + token[:, None] * width + column, total, here)
