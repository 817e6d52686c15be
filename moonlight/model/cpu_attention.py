"""Causal attention for processors: in tiles that stay in their caches, forward and backward.

Torch's own on a CPU writes all logits of a sequence to memory where keys are wider than values, as latent attention
has them. Here a tile is some heads' logits of some rows; what lies above the diagonal is not computed, and nothing of
the size of the logits is kept for the backward pass, which computes them again (arXiv 2205.14135 without its running
softmax: a tile has whole rows).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

TILE_ELEMENTS = 2**18
"""Logits of a tile, as float32 the size of a second-level cache."""
TILE_ROWS = 128
LOG2_E = math.log2(math.e)
"""Powers of 2 take a third of the time of powers of e."""


def _by_head(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[sequence, batch, heads, dim] as [batch * heads, sequence, dim], in memory too."""
    return tensor.flatten(1, 2).transpose(0, 1).contiguous().to(dtype)


def _by_place(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `_by_head`, as a view."""
    return tensor.to(like.dtype).transpose(0, 1).view(like.shape)


class _Tile:
    """Some heads' logits of some rows, and the keys that those rows see; [batch * heads, sequence, ...] is cut."""

    def __init__(self, first_head: int, last_head: int, start: int, stop: int, bias: torch.Tensor) -> None:
        self.heads = slice(first_head, last_head)
        self.rows = slice(start, stop)
        self.keys = slice(0, stop)
        self.bias = bias

    def logits(self, query: torch.Tensor, key: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """q k^T [heads, rows, keys], -inf where a row may not look, plus a number a row [heads, rows, 1]."""
        bias = self.bias if plus is None else self.bias + plus
        return torch.baddbmm(bias, query[self.heads, self.rows], key[self.heads, self.keys].mT)


def _tiles(length: int, heads: int, documents: torch.Tensor | None) -> Iterator[_Tile]:
    """Every tile of the lower triangle. With documents, a tile's heads belong to one sequence of the batch."""
    in_sequence = heads if documents is None else heads // len(documents)
    future = torch.full((TILE_ROWS, TILE_ROWS), -math.inf).triu_(1)
    for start in range(0, length, TILE_ROWS):
        stop = min(start + TILE_ROWS, length)
        rows = stop - start
        together = max(1, TILE_ELEMENTS // (rows * stop))
        causal = torch.nn.functional.pad(future[:rows, :rows], (start, 0))
        for sequence in range(heads // in_sequence):
            bias = causal
            if documents is not None:
                own = documents[sequence]
                bias = causal.masked_fill(own[start:stop, None] != own[None, :stop], -math.inf)
            last_head = (sequence + 1) * in_sequence
            for first in range(sequence * in_sequence, last_head, together):
                yield _Tile(first, min(first + together, last_head), start, stop, bias)


class CpuAttention(torch.autograd.Function):
    """softmax(q k^T * scale) v under a causal mask and within documents.

    q and k [sequence, batch, heads, dim], v and the result [sequence, batch, heads, v_head_dim], of one dtype;
    documents int [batch, sequence] or None. Logits and their softmax are float32 whatever the inputs are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        documents: torch.Tensor | None,
    ) -> torch.Tensor:
        length, batch, heads, _ = query.shape
        q, k, v = _by_head(query, torch.float32), _by_head(key, torch.float32), _by_head(value, value.dtype)
        q = q * (scale * LOG2_E)
        out, log_sums = torch.empty_like(v), q.new_empty(batch * heads, length, 1)
        for tile in _tiles(length, batch * heads, documents):
            weights = tile.logits(q, k)
            maximum = weights.amax(-1, keepdim=True)
            weights.sub_(maximum).exp2_()
            total = weights.sum(-1, keepdim=True)
            rows = tile.heads, tile.rows
            out[rows] = torch.bmm(weights.to(v.dtype), v[tile.heads, tile.keys]).div_(total)
            log_sums[rows] = total.log2_().add_(maximum)
        result = _by_place(out, value)
        ctx.save_for_backward(query, key, value, result, log_sums)
        ctx.scale, ctx.documents = scale, documents
        return result

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> Any:
        query, key, value, result, log_sums = ctx.saved_tensors
        length, batch, heads, _ = query.shape
        dtype = value.dtype
        q, k, v, g, out = (_by_head(x, dtype) for x in (query, key, value, grad_out, result))
        exact_q, exact_k = _by_head(query, torch.float32).mul(ctx.scale * LOG2_E), k.float()
        # Of dS = P (dP - sum of dO O), with the scale of the logits.
        minus = torch.sum(g * out, -1, keepdim=True, dtype=torch.float32).mul_(-ctx.scale).to(dtype)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for tile in _tiles(length, batch * heads, ctx.documents):
            rows, keys = (tile.heads, tile.rows), (tile.heads, tile.keys)
            weights = tile.logits(exact_q, exact_k, -log_sums[rows]).exp2_()
            grad_v[keys] += torch.bmm(weights.to(dtype).mT, g[rows])
            grad = torch.baddbmm(minus[rows], g[rows], v[keys].mT, alpha=ctx.scale)
            grad = weights.mul_(grad).to(dtype)
            torch.bmm(grad, k[keys], out=grad_q[rows])
            grad_k[keys] += torch.bmm(grad.mT, q[rows])
        return _by_place(grad_q, query), _by_place(grad_k, key), _by_place(grad_v, value), None, None
