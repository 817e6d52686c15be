"""Blocks of rows: torch references make several passes over a block while it is in the caches of a CPU."""

from collections.abc import Iterator

import torch

BLOCK_ELEMENTS = 2**18
"""Elements of one tensor in a block: 1 MiB in float32. Smaller blocks lose more time to the overhead of operations than
they save."""


def row_blocks(rows: int, width: int, block_elements: int | None = None) -> Iterator[slice]:
    """Yield slices of rows that cover `rows` rows of `width` elements, of at most `block_elements` or one row each."""
    step = max(1, (block_elements or BLOCK_ELEMENTS) // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def float_block(source: torch.Tensor, rows: slice) -> torch.Tensor:
    """Return float32 memory for results of these rows: the rows of a float32 `source`, otherwise a new tensor."""
    block = source[rows]
    return block if block.dtype == torch.float32 else torch.empty(block.shape, device=block.device)


def store(target: torch.Tensor, rows: slice, block: torch.Tensor) -> None:
    """Round a block from `float_block` into the rows of `target`. A float32 target already holds the block."""
    if target.dtype != torch.float32:
        target[rows] = block


def add_(total: torch.Tensor, values: torch.Tensor) -> None:
    """total += values, of the same shape and any dtypes.

    On a CPU, torch first copies `values` to the dtype of `total`. In blocks, that takes little memory.
    """
    if total.dtype == values.dtype or total.is_cuda or not total.dim():
        total.add_(values)
        return
    for block in row_blocks(len(total), total[:1].numel()):
        total[block] += values[block]


def new_like(like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return an empty contiguous tensor with the shape of `like`, in `dtype` or its dtype."""
    return torch.empty(like.shape, dtype=dtype or like.dtype, device=like.device)


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """Return `x` with contiguous rows, copied if necessary. Rows may be apart, as in half of a tensor."""
    return x if x.stride(-1) == 1 else x.contiguous()
