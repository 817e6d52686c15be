"""Root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467, equation 4), alone or fused with the sum before it.

All arithmetic is float32. A float32 residual stream may have a bfloat16 gain.
"""

from __future__ import annotations  # kernels use `tl.constexpr`, which does not exist without Triton

import torch
from torch import Tensor

from moonlight.kernels.blocks import dense_rows, float_block, new_like, row_blocks, store
from moonlight.kernels.jit import jit, tl, triton

TILE_ELEMENTS, NUM_WARPS = 4096, 8
"""A program holds full rows, with at most TILE_ELEMENTS elements or one row."""
BACKWARD_PROGRAMS = 264
"""Number of partial sums of the gain's gradient: two programs on each of 132 multiprocessors. A constant, so that the
order of the sum depends on the shape alone."""

Normed = tuple[Tensor, Tensor]
"""(norm, reciprocals) as in `rms_norm`."""
Added = tuple[Tensor, Tensor, Tensor]
"""(sum, norm, reciprocals) as in `add_rms_norm`."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Normed:
    """Return the norm x / sqrt(mean(x^2) + eps) * weight, and the reciprocal root mean squares.

    The norm has the dtype of `weight`; the reciprocals are float32 [rows].
    `x` is float32 or bfloat16 [..., hidden], where all leading dimensions form the rows; `weight` is [hidden].
    """
    return (rms_norm_triton if x.is_cuda else rms_norm_torch)(x, weight, eps)


def add_rms_norm(residual: Tensor, update: Tensor, weight: Tensor, eps: float) -> Added:
    """Return (residual + update in the dtype of `residual`, its `rms_norm`, reciprocals); shapes as in `rms_norm`.

    The norm is that of the rounded sum, so `rms_norm_backward` of the returned sum is the gradient.
    """
    return (add_rms_norm_triton if residual.is_cuda else add_rms_norm_torch)(residual, update, weight, eps)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, reciprocal: Tensor, grad_residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (gradient of `x` in its dtype, gradient of the gain in its dtype).

    The result is deterministic: the order in which the gain's gradient is summed depends on the shape alone.

    Args:
        grad: gradient of `rms_norm`'s result, [..., hidden].
        grad_residual: gradient that reaches `x` by the residual connection, [..., hidden]; it is added.
    """
    function = rms_norm_backward_triton if x.is_cuda else rms_norm_backward_torch
    return function(grad, x, weight, reciprocal, grad_residual)


def _matrix(x: Tensor) -> Tensor:
    """Return `x` as [rows, hidden] with contiguous rows."""
    return dense_rows(x.reshape(-1, x.shape[-1]))


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Normed:
    """Reference of `rms_norm_triton`."""
    return _forward_torch(x, None, weight, eps)[1:]


def add_rms_norm_torch(residual: Tensor, update: Tensor, weight: Tensor, eps: float) -> Added:
    """Reference of `add_rms_norm_triton`."""
    return _forward_torch(residual, update, weight, eps)


def _operands(x: Tensor, update: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Return `x` and the update as matrices, and the outputs: sum (`x` without an update), norm and reciprocals."""
    matrix, added = _matrix(x), None if update is None else _matrix(update)
    total = matrix if added is None else new_like(matrix)
    return matrix, added, total, new_like(matrix, weight.dtype), new_like(matrix[:, 0], torch.float32)


def _forward_torch(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> Added:
    """Return (sum, or `x` without an update; norm; reciprocals)."""
    matrix, added, total, normed, reciprocal = _operands(x, update, weight)
    gain = weight.float()
    for rows in row_blocks(*matrix.shape):
        if added is not None:
            torch.add(matrix[rows], added[rows], out=total[rows])
        values, block, scale = total[rows].float(), float_block(normed, rows), reciprocal[rows]
        torch.mean(torch.mul(values, values, out=block), 1, out=scale)
        scale.add_(eps).rsqrt_()
        torch.mul(values, scale[:, None], out=block).mul_(gain)
        store(normed, rows, block)
    return total.view(x.shape), normed.view(x.shape), reciprocal


def rms_norm_backward_torch(
    grad: Tensor, x: Tensor, weight: Tensor, reciprocal: Tensor, grad_residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Reference of `rms_norm_backward_triton`."""
    matrix, grad_matrix = _matrix(x), _matrix(grad)
    residual = None if grad_residual is None else _matrix(grad_residual)
    grad_x, gain = new_like(matrix), weight.float()
    grad_gain = torch.zeros_like(gain)
    for rows in row_blocks(*matrix.shape):
        incoming, block, scale = grad_matrix[rows].float(), float_block(grad_x, rows), reciprocal[rows, None]
        direction = matrix[rows].float() * scale
        torch.mul(incoming, direction, out=block)
        grad_gain += block.sum(0)
        # The component of the gradient along each row, which the norm removes.
        along = torch.mv(block, gain).div_(len(gain))
        torch.mul(incoming, gain, out=block)
        block.sub_(direction.mul_(along[:, None])).mul_(scale)
        if residual is not None:
            block.add_(residual[rows])
        store(grad_x, rows, block)
    return grad_x.view(x.shape), grad_gain.to(weight.dtype)


def _tile(hidden: int) -> tuple[int, int]:
    """Return the rows and columns of a program's tile."""
    width = triton.next_power_of_2(hidden)
    return max(1, TILE_ELEMENTS // width), width


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Normed:
    """Make one pass: read x, write its norm."""
    return _forward_triton(x, None, weight, eps)[1:]


def add_rms_norm_triton(residual: Tensor, update: Tensor, weight: Tensor, eps: float) -> Added:
    """Make one pass: read both, write sum and norm."""
    return _forward_triton(residual, update, weight, eps)


def _forward_triton(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> Added:
    """Return (sum, or `x` without an update; norm; reciprocals)."""
    matrix, added, total, normed, reciprocal = _operands(x, update, weight)
    rows, hidden = matrix.shape
    tile = _tile(hidden)
    with torch.cuda.device_of(matrix):
        _forward[(triton.cdiv(rows, tile[0]),)](
            matrix, added, weight, total, normed, reciprocal, rows, hidden,
            matrix.stride(0), 0 if added is None else added.stride(0), eps, *tile, num_warps=NUM_WARPS,
        )  # fmt: skip
    return total.view(x.shape), normed.view(x.shape), reciprocal


def rms_norm_backward_triton(
    grad: Tensor, x: Tensor, weight: Tensor, reciprocal: Tensor, grad_residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Make one pass: read grad and x, write the gradient of x. Every program writes one partial sum for the gain."""
    matrix, grad_matrix = _matrix(x), _matrix(grad)
    residual = None if grad_residual is None else _matrix(grad_residual)
    rows, hidden = matrix.shape
    tile = _tile(hidden)
    tiles = triton.cdiv(rows, tile[0])
    tiles_per_program = max(1, triton.cdiv(tiles, BACKWARD_PROGRAMS))
    programs = triton.cdiv(tiles, tiles_per_program)
    grad_x = new_like(matrix)
    partial = torch.empty(programs, hidden, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(matrix):
        _backward[(programs,)](
            grad_matrix, matrix, weight, reciprocal, residual, grad_x, partial, rows, hidden,
            grad_matrix.stride(0), matrix.stride(0), 0 if residual is None else residual.stride(0),
            tiles_per_program, *tile, num_warps=NUM_WARPS,
        )  # fmt: skip
    return grad_x.view(x.shape), partial.sum(0).to(weight.dtype)


@jit
def _forward(
    x, update, weight, total, normed, reciprocal, rows, hidden, x_stride, update_stride, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    mask = (row < rows)[:, None] & (column < hidden)
    values = tl.load(x + row[:, None] * x_stride + column, mask, 0.0).to(tl.float32)
    offsets = row[:, None] * hidden + column
    if update is not None:
        values += tl.load(update + row[:, None] * update_stride + column, mask, 0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + offsets, rounded, mask)
        values = rounded.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values, 1) / hidden + eps)
    tl.store(reciprocal + row, scale, row < rows)
    gain = tl.load(weight + column, column < hidden, 0.0).to(tl.float32)
    tl.store(normed + offsets, values * scale[:, None] * gain, mask)


@jit
def _backward(
    grad, x, weight, reciprocal, residual, grad_x, partial, rows, hidden, grad_stride, x_stride, residual_stride,
    tiles_per_program, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)[None, :]
    gain = tl.load(weight + column, column < hidden, 0.0).to(tl.float32)
    grad_gain = tl.zeros([ROWS, WIDTH], tl.float32)
    first = tl.program_id(0).to(tl.int64) * tiles_per_program * ROWS
    for tile in range(0, tiles_per_program):
        row = first + tile * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < hidden)
        incoming = tl.load(grad + row[:, None] * grad_stride + column, mask, 0.0).to(tl.float32)
        values = tl.load(x + row[:, None] * x_stride + column, mask, 0.0).to(tl.float32)
        scale = tl.load(reciprocal + row, row < rows, 0.0)[:, None]
        direction = values * scale
        grad_gain += incoming * direction
        incoming *= gain
        # The component of the gradient along each row, which the norm removes.
        along = tl.sum(incoming * direction, 1)[:, None] / hidden
        result = (incoming - direction * along) * scale
        if residual is not None:
            result += tl.load(residual + row[:, None] * residual_stride + column, mask, 0.0).to(tl.float32)
        tl.store(grad_x + row[:, None] * hidden + column, result, mask)
    columns = tl.arange(0, WIDTH)
    tl.store(partial + tl.program_id(0) * hidden + columns, tl.sum(grad_gain, 0), columns < hidden)
