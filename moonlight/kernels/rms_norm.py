"""Root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467, equation 4), alone or after the sum that feeds it.

All is float32 inside; a float32 residual stream can feed a bfloat16 gain.
"""

from __future__ import annotations  # kernels name `tl.constexpr`, which is not there without Triton

import torch

from moonlight.kernels.blocks import dense_rows, float_block, new_like, row_blocks, store
from moonlight.kernels.jit import jit, tl, triton

TILE_ELEMENTS, NUM_WARPS = 4096, 8
"""A program holds whole rows, as many as fit into so many elements, at least one."""
BACKWARD_PROGRAMS = 264
"""Partial sums of the gain's gradient: two programs on each of 132 multiprocessors. A constant, so that the order of
the sum depends on the shape alone."""

Normed = tuple[torch.Tensor, torch.Tensor]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Normed:
    """(x / sqrt(mean(x^2) + eps) * weight in the dtype of `weight`, reciprocal root mean squares float32 [rows]).

    `x` float32 or bfloat16 [..., hidden], of which all leading dimensions make the rows; `weight` [hidden].
    """
    return (rms_norm_triton if x.is_cuda else rms_norm_torch)(x, weight, eps)


def add_rms_norm(
    residual: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(residual + update in the dtype of `residual`, its `rms_norm`, reciprocals); shapes as there.

    What is normed is the sum as it is returned, so that `rms_norm_backward` of that sum is the gradient.
    """
    return (add_rms_norm_triton if residual.is_cuda else add_rms_norm_torch)(residual, update, weight, eps)


def rms_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    reciprocal: torch.Tensor,
    grad_residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of x in its dtype, of the gain in its dtype), given that of `rms_norm`'s result.

    `grad_residual` [..., hidden] is what else reaches `x`, past the norm; it is added. The same bits every time: the
    gain's gradient is summed in an order that the shape decides.
    """
    function = rms_norm_backward_triton if x.is_cuda else rms_norm_backward_torch
    return function(grad, x, weight, reciprocal, grad_residual)


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """[rows, hidden], elements of a row side by side."""
    return dense_rows(x.reshape(-1, x.shape[-1]))


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Normed:
    """The twin of `rms_norm_triton`."""
    matrix = _matrix(x)
    normed, reciprocal = new_like(matrix, weight.dtype), new_like(matrix[:, 0], torch.float32)
    gain = weight.float()
    for rows in row_blocks(*matrix.shape):
        _norm_rows(matrix, gain, eps, normed, reciprocal, rows)
    return normed.view(x.shape), reciprocal


def add_rms_norm_torch(
    residual: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The twin of `add_rms_norm_triton`."""
    one, other = _matrix(residual), _matrix(update)
    total, normed, reciprocal = new_like(one), new_like(one, weight.dtype), new_like(one[:, 0], torch.float32)
    gain = weight.float()
    for rows in row_blocks(*one.shape):
        torch.add(one[rows], other[rows], out=total[rows])
        _norm_rows(total, gain, eps, normed, reciprocal, rows)
    return total.view(residual.shape), normed.view(residual.shape), reciprocal


def _norm_rows(
    x: torch.Tensor, gain: torch.Tensor, eps: float, normed: torch.Tensor, reciprocal: torch.Tensor, rows: slice
) -> None:
    values, block, scale = x[rows].float(), float_block(normed, rows), reciprocal[rows]
    torch.mean(torch.mul(values, values, out=block), 1, out=scale)
    scale.add_(eps).rsqrt_()
    torch.mul(values, scale[:, None], out=block).mul_(gain)
    store(normed, rows, block)


def rms_norm_backward_torch(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    reciprocal: torch.Tensor,
    grad_residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of `rms_norm_backward_triton`."""
    matrix, gradient = _matrix(x), _matrix(grad)
    past = None if grad_residual is None else _matrix(grad_residual)
    to_x, gain = new_like(matrix), weight.float()
    to_gain = torch.zeros_like(gain)
    for rows in row_blocks(*matrix.shape):
        incoming, block, scale = gradient[rows].float(), float_block(to_x, rows), reciprocal[rows, None]
        direction = matrix[rows].float() * scale
        torch.mul(incoming, direction, out=block)
        to_gain += block.sum(0)
        # The part of the gradient along each row, which the norm takes away.
        along = torch.mv(block, gain).div_(len(gain))
        torch.mul(incoming, gain, out=block)
        block.sub_(direction.mul_(along[:, None])).mul_(scale)
        if past is not None:
            block.add_(past[rows])
        store(to_x, rows, block)
    return to_x.view(x.shape), to_gain.to(weight.dtype)


def _tile(hidden: int) -> tuple[int, int]:
    """Rows and columns of what a program holds."""
    width = triton.next_power_of_2(hidden)
    return max(1, TILE_ELEMENTS // width), width


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Normed:
    """One pass: reads x, writes its norm."""
    _, normed, reciprocal = _launch_forward(x, None, weight, eps)
    return normed, reciprocal


def add_rms_norm_triton(
    residual: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One pass: reads both, writes sum and norm."""
    return _launch_forward(residual, update, weight, eps)


def _launch_forward(
    x: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum, or `x` itself without an update; norm; reciprocals)."""
    matrix = _matrix(x)
    other = None if update is None else _matrix(update)
    total = matrix if update is None else new_like(matrix)
    normed, reciprocal = new_like(matrix, weight.dtype), new_like(matrix[:, 0], torch.float32)
    rows, hidden = matrix.shape
    tile = _tile(hidden)
    with torch.cuda.device_of(matrix):
        _forward[(triton.cdiv(rows, tile[0]),)](
            matrix,
            other,
            weight,
            total,
            normed,
            reciprocal,
            rows,
            hidden,
            matrix.stride(0),
            0 if other is None else other.stride(0),
            eps,
            *tile,
            num_warps=NUM_WARPS,
        )
    return total.view(x.shape) if update is not None else x, normed.view(x.shape), reciprocal


def rms_norm_backward_triton(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    reciprocal: torch.Tensor,
    grad_residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass: reads grad and x, writes the gradient of x; every program leaves one partial sum for the gain."""
    matrix, gradient = _matrix(x), _matrix(grad)
    past = None if grad_residual is None else _matrix(grad_residual)
    rows, hidden = matrix.shape
    tile = _tile(hidden)
    tiles = triton.cdiv(rows, tile[0])
    tiles_each = max(1, triton.cdiv(tiles, BACKWARD_PROGRAMS))
    programs = triton.cdiv(tiles, tiles_each)
    to_x = new_like(matrix)
    partial = torch.empty(programs, hidden, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(matrix):
        _backward[(programs,)](
            gradient,
            matrix,
            weight,
            reciprocal,
            past,
            to_x,
            partial,
            rows,
            hidden,
            gradient.stride(0),
            matrix.stride(0),
            0 if past is None else past.stride(0),
            tiles_each,
            *tile,
            num_warps=NUM_WARPS,
        )
    return to_x.view(x.shape), partial.sum(0).to(weight.dtype)


@jit
def _forward(
    x,
    update,
    weight,
    total,
    normed,
    reciprocal,
    rows,
    hidden,
    x_stride,
    update_stride,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    here = (row < rows)[:, None] & (column < hidden)
    values = tl.load(x + row[:, None] * x_stride + column, here, 0.0).to(tl.float32)
    at = row[:, None] * hidden + column
    if update is not None:
        values += tl.load(update + row[:, None] * update_stride + column, here, 0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + at, rounded, here)
        values = rounded.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values, 1) / hidden + eps)
    tl.store(reciprocal + row, scale, row < rows)
    gain = tl.load(weight + column, column < hidden, 0.0).to(tl.float32)
    tl.store(normed + at, values * scale[:, None] * gain, here)


@jit
def _backward(
    grad,
    x,
    weight,
    reciprocal,
    past,
    to_x,
    partial,
    rows,
    hidden,
    grad_stride,
    x_stride,
    past_stride,
    tiles_each,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    column = tl.arange(0, WIDTH)[None, :]
    gain = tl.load(weight + column, column < hidden, 0.0).to(tl.float32)
    to_gain = tl.zeros([ROWS, WIDTH], tl.float32)
    first = tl.program_id(0).to(tl.int64) * tiles_each * ROWS
    for tile in range(0, tiles_each):
        row = first + tile * ROWS + tl.arange(0, ROWS)
        here = (row < rows)[:, None] & (column < hidden)
        incoming = tl.load(grad + row[:, None] * grad_stride + column, here, 0.0).to(tl.float32)
        values = tl.load(x + row[:, None] * x_stride + column, here, 0.0).to(tl.float32)
        scale = tl.load(reciprocal + row, row < rows, 0.0)[:, None]
        direction = values * scale
        to_gain += incoming * direction
        incoming *= gain
        # The part of the gradient along each row, which the norm takes away.
        along = tl.sum(incoming * direction, 1)[:, None] / hidden
        result = (incoming - direction * along) * scale
        if past is not None:
            result += tl.load(past + row[:, None] * past_stride + column, here, 0.0).to(tl.float32)
        tl.store(to_x + row[:, None] * hidden + column, result, here)
    columns = tl.arange(0, WIDTH)
    tl.store(partial + tl.program_id(0) * hidden + columns, tl.sum(to_gain, 0), columns < hidden)
