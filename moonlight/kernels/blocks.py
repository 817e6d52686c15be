"""Rows at a time, for twins that pass several times over what the caches of a CPU still hold."""

from collections.abc import Iterator

import torch

BLOCK_ELEMENTS = 2**18
"""Elements of one tensor in a block: 1 MiB in float32. Smaller blocks lose more to the start of operations than they
save."""


def row_blocks(rows: int, width: int, block_elements: int | None = None) -> Iterator[slice]:
    """Slices that cover `rows` rows of `width` elements."""
    step = max(1, (block_elements or BLOCK_ELEMENTS) // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def float_block(source: torch.Tensor, rows: slice) -> torch.Tensor:
    """Where float32 results for `rows` of `whole` can be written: those rows themselves, or else scratch."""
    block = source[rows]
    return block if block.dtype == torch.float32 else torch.empty(block.shape, device=block.device)


def store(target: torch.Tensor, rows: slice, block: torch.Tensor) -> None:
    """Round scratch from `float_block` into its place; nothing where the block is that place."""
    if target.dtype != torch.float32:
        target[rows] = block


def add_(total: torch.Tensor, values: torch.Tensor) -> None:
    """total += values, of the same shape and any dtypes.

    Torch on a CPU first makes a copy of `values` in the dtype of `total`; block by block it needs no new memory.
    """
    if total.dtype == values.dtype or total.is_cuda or not total.dim():
        total.add_(values)
        return
    for block in row_blocks(len(total), total[:1].numel()):
        total[block] += values[block]


def new_like(like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An empty contiguous tensor of the same shape, in `dtype` or the same dtype, whatever strides `like` has."""
    return torch.empty(like.shape, dtype=dtype or like.dtype, device=like.device)


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """`x`, whose elements of a row must lie side by side; rows may lie apart, as those of half a tensor do."""
    return x if x.stride(-1) == 1 else x.contiguous()
