"""Causal attention for CPUs, in tiles that fit the cache, forward and backward.

If keys are wider than values, as in latent attention, torch's CPU attention writes all logits of a sequence to memory.
Here a tile holds the logits of a range of rows for a range of heads. Logits above the diagonal are not computed. The
backward pass recomputes the logits instead of saving them (arXiv 2205.14135; a tile has full rows, so no running
softmax is needed).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

TILE_ELEMENTS = 2**18
"""Maximum number of logits in a tile: 1 MiB in float32, the size of a second-level cache."""
TILE_ROWS = 128
LOG2_E = math.log2(math.e)
"""Factor from base e to base 2: powers of 2 take a third of the time of powers of e."""


def _by_head(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return [sequence, batch, heads, dim] as contiguous [batch * heads, sequence, dim] in `dtype`."""
    return tensor.flatten(1, 2).transpose(0, 1).contiguous().to(dtype)


def _by_position(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the inverse of `_by_head`: a view with the shape and dtype of `like`."""
    return tensor.to(like.dtype).transpose(0, 1).view(like.shape)


class _Tile:
    """A range of heads and rows of [batch * heads, sequence, ...], and the keys that these rows may attend to."""

    def __init__(self, start_head: int, stop_head: int, start: int, stop: int, bias: torch.Tensor) -> None:
        self.heads = slice(start_head, stop_head)
        self.rows = slice(start, stop)
        self.keys = slice(0, stop)
        self.bias = bias

    def logits(self, query: torch.Tensor, key: torch.Tensor, row_bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return q k^T [heads, rows, keys], -inf at masked positions, plus `row_bias` [heads, rows, 1]."""
        bias = self.bias if row_bias is None else self.bias + row_bias
        return torch.baddbmm(bias, query[self.heads, self.rows], key[self.heads, self.keys].mT)


def _tiles(length: int, heads: int, document_ids: torch.Tensor | None) -> Iterator[_Tile]:
    """Yield every tile of the lower triangle. With `document_ids`, a tile covers heads of one sequence only."""
    heads_per_mask = heads if document_ids is None else heads // len(document_ids)  # heads that share a mask
    future = torch.full((TILE_ROWS, TILE_ROWS), -math.inf).triu_(1)
    for start in range(0, length, TILE_ROWS):
        stop = min(start + TILE_ROWS, length)
        rows = stop - start
        tile_heads = max(1, TILE_ELEMENTS // (rows * stop))
        causal = torch.nn.functional.pad(future[:rows, :rows], (start, 0))
        for sequence in range(heads // heads_per_mask):
            bias = causal
            if document_ids is not None:
                ids = document_ids[sequence]
                bias = causal.masked_fill(ids[start:stop, None] != ids[None, :stop], -math.inf)
            stop_head = (sequence + 1) * heads_per_mask
            for start_head in range(sequence * heads_per_mask, stop_head, tile_heads):
                yield _Tile(start_head, min(start_head + tile_heads, stop_head), start, stop, bias)


class CpuAttention(torch.autograd.Function):
    """softmax(q k^T * scale) v under a causal mask; with document ids, within each document only.

    Shapes: q and k [sequence, batch, heads, dim], v and the result [sequence, batch, heads, v_head_dim], of one dtype;
    document_ids int [batch, sequence] or None. Logits and their softmax are float32 for any input dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        document_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        length, batch, heads, _ = query.shape
        q, k, v = _by_head(query, torch.float32), _by_head(key, torch.float32), _by_head(value, value.dtype)
        q = q * (scale * LOG2_E)
        out, log_sums = torch.empty_like(v), q.new_empty(batch * heads, length, 1)
        for tile in _tiles(length, batch * heads, document_ids):
            weights = tile.logits(q, k)
            maximum = weights.amax(-1, keepdim=True)
            weights.sub_(maximum).exp2_()
            total = weights.sum(-1, keepdim=True)
            rows = tile.heads, tile.rows
            out[rows] = torch.bmm(weights.to(v.dtype), v[tile.heads, tile.keys]).div_(total)
            log_sums[rows] = total.log2_().add_(maximum)
        result = _by_position(out, value)
        ctx.save_for_backward(query, key, value, result, log_sums)
        ctx.scale, ctx.document_ids = scale, document_ids
        return result

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> Any:
        query, key, value, result, log_sums = ctx.saved_tensors
        length, batch, heads, _ = query.shape
        dtype = value.dtype
        q, k, v, g, out = (_by_head(x, dtype) for x in (query, key, value, grad_out, result))
        exact_q, exact_k = _by_head(query, torch.float32).mul(ctx.scale * LOG2_E), k.float()
        # The second term of dS = P * (dP - rowsum(dO * O)), times the scale of the logits.
        minus_row_sum = torch.sum(g * out, -1, keepdim=True, dtype=torch.float32).mul_(-ctx.scale).to(dtype)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for tile in _tiles(length, batch * heads, ctx.document_ids):
            rows, keys = (tile.heads, tile.rows), (tile.heads, tile.keys)
            weights = tile.logits(exact_q, exact_k, -log_sums[rows]).exp2_()
            grad_v[keys] += torch.bmm(weights.to(dtype).mT, g[rows])
            grad = torch.baddbmm(minus_row_sum[rows], g[rows], v[keys].mT, alpha=ctx.scale)
            grad = weights.mul_(grad).to(dtype)
            torch.bmm(grad, k[keys], out=grad_q[rows])
            grad_k[keys] += torch.bmm(grad.mT, q[rows])
        return _by_position(grad_q, query), _by_position(grad_k, key), _by_position(grad_v, value), None, None
