"""Batched matrix products with a symmetric result: compute half of the tiles, and mirror them.

Newton-Schulz needs two kinds: X X^T, and the product of two symmetric matrices that commute.
"""

from __future__ import annotations  # kernels use `tl.constexpr`, which does not exist without Triton

from dataclasses import dataclass

import torch
from torch import Tensor

from moonlight.kernels.jit import jit, tl, triton


@dataclass(frozen=True)
class Tiling:
    """Tile sizes of a product. They change the order of sums, and otherwise not the result."""

    side: int = 128
    """Rows and columns of a tile of the result; tl.dot needs at least 16, wgmma a multiple of 64."""
    depth: int = 64
    """Elements of the inner dimension per multiplication."""
    group: int = 8
    """Columns of tiles computed together, so that their operands stay in the L2 cache."""
    num_warps: int = 4
    num_stages: int = 3


TILING = Tiling()
"""Two programs fit on a multiprocessor of Hopper, so one computes while the other stores. Has not been measured."""


def symmetric_product(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    *,
    alpha: float = 1,
    added: Tensor | None = None,
    beta: float = 0,
    gamma: float = 0,
    tiling: Tiling = TILING,
) -> None:
    """out <- alpha left right + beta added + gamma I, for a symmetric result.

    Sums are float32 and rounded once. `out` is exactly symmetric. No operand is copied.

    Args:
        left: [count, n, k], float16, bfloat16 or float32, with any strides, such as X.mT.
        right: [count, k, n] of the same dtype; left right is symmetric except for rounding.
        out: [count, n, n]; may be `added`, but not `left` or `right`.
        added: symmetric [count, n, n].

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    count, n, k = left.shape
    for name, tensor, shape in (
        ("right", right, (count, k, n)),
        ("out", out, (count, n, n)),
        ("added", added, out.shape),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}: with left {list(left.shape)} it must be {list(shape)}"
            )
    if left.dtype is not right.dtype or left.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtypes are {left.dtype} and {right.dtype}: one of float16, bfloat16, float32 is accepted")
    tiles = triton.cdiv(n, tiling.side)
    addend = out if added is None else added
    with torch.cuda.device_of(out):
        _product_kernel[(count * (tiles * (tiles + 1) // 2),)](
            left, right, addend, out, n, k, alpha, beta, gamma,
            *left.stride(), *right.stride(), *addend.stride(), *out.stride(),
            HAS_ADDED=added is not None,
            PRECISION="ieee" if left.dtype is torch.float32 else "tf32",
            WIDEN=left.dtype is torch.bfloat16 and left.device.type == "cpu",
            EVEN_N=n % tiling.side == 0,
            EVEN_K=k % tiling.depth == 0,
            SIDE=tiling.side,
            DEPTH=tiling.depth,
            GROUP=tiling.group,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
            enable_fp_fusion=True,
        )  # fmt: skip


@jit
def _triangle_column(index):
    """Return the column of a tile of an upper triangle, where `index` counts tiles column by column."""
    column = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)
    column -= (column * (column + 1) // 2 > index).to(tl.int32)  # the rounded root may be off by one
    column += ((column + 1) * (column + 2) // 2 <= index).to(tl.int32)
    return column


@jit
def _upper_tile(index, tiles, GROUP: tl.constexpr):
    """Return the row and column of a tile on or above the diagonal.

    Tiles are counted in groups of columns. Within a group they are counted row by row, and last the small triangle at
    the diagonal.
    """
    first = _triangle_column(index) // GROUP * GROUP
    width = tl.minimum(GROUP, tiles - first)
    index_in_group = index - first * (first + 1) // 2
    inside = index_in_group - first * width
    column = _triangle_column(tl.maximum(inside, 0))
    at_diagonal = inside >= 0
    row = tl.where(at_diagonal, first + inside - column * (column + 1) // 2, index_in_group // width)
    return row, first + tl.where(at_diagonal, column, index_in_group % width)


@jit
def _product_kernel(
    left, right, added, out, n, k, alpha, beta, gamma,
    left_count, left_row, left_column,
    right_count, right_row, right_column,
    added_count, added_row, added_column,
    out_count, out_row, out_column,
    HAS_ADDED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    SIDE: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n, SIDE)
    per_matrix = tiles * (tiles + 1) // 2
    matrix = (tl.program_id(0) // per_matrix).to(tl.int64)
    tile_row, tile_column = _upper_tile(tl.program_id(0) % per_matrix, tiles, GROUP)
    rows = tile_row * SIDE + tl.arange(0, SIDE)
    columns = tile_column * SIDE + tl.arange(0, SIDE)
    inner = tl.arange(0, DEPTH)
    left += matrix * left_count + rows[:, None] * left_row + inner[None, :] * left_column
    right += matrix * right_count + inner[:, None] * right_row + columns[None, :] * right_column
    sums = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    for start in range(0, k, DEPTH):
        if EVEN_N and EVEN_K:
            a, b = tl.load(left), tl.load(right)
        else:
            is_inner = inner < k - start
            a = tl.load(left, mask=(rows < n)[:, None] & is_inner[None, :], other=0.0)
            b = tl.load(right, mask=is_inner[:, None] & (columns < n)[None, :], other=0.0)
        if WIDEN:  # Triton's interpreter cannot multiply bfloat16
            a, b = a.to(tl.float32), b.to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
        left += DEPTH * left_column
        right += DEPTH * right_row
    sums *= alpha
    is_inside = (rows < n)[:, None] & (columns < n)[None, :]
    if HAS_ADDED:
        added += matrix * added_count + rows[:, None] * added_row + columns[None, :] * added_column
        sums += beta * tl.load(added, mask=is_inside, other=0.0).to(tl.float32)
    sums += tl.where(rows[:, None] == columns[None, :], gamma, 0.0)
    result = sums.to(out.dtype.element_ty)
    upper = out + matrix * out_count + rows[:, None] * out_row + columns[None, :] * out_column
    lower = out + matrix * out_count + columns[None, :] * out_row + rows[:, None] * out_column
    if tile_row == tile_column:  # a tile on the diagonal: store its upper triangle twice
        is_inside = is_inside & (rows[:, None] <= columns[None, :])
        tl.store(upper, result, mask=is_inside)
        tl.store(lower, result, mask=is_inside)
    elif EVEN_N:
        tl.store(upper, result)
        tl.store(lower, result)
    else:
        tl.store(upper, result, mask=is_inside)
        tl.store(lower, result, mask=is_inside)
