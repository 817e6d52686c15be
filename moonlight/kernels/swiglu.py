"""SwiGLU: silu(gate) * up, scaled by the router's probability of each token.

The backward pass needs only gate and up. It also recomputes the inner activation, for the weight gradient of the
down-projection.
"""

from __future__ import annotations  # kernels use `tl.constexpr`, which does not exist without Triton

import torch
import torch.nn.functional as F
from torch import Tensor

from moonlight.kernels.blocks import dense_rows, float_block, new_like, row_blocks, store
from moonlight.kernels.jit import jit, tl, triton

ROWS, COLUMNS, NUM_WARPS = 4, 512, 4

Gradients = tuple[Tensor, Tensor, Tensor | None, Tensor]
"""(grad_gate, grad_up, grad_probabilities, inner) as in `swiglu_backward`."""
Pair = tuple[Tensor, Tensor]


def swiglu(gate: Tensor, up: Tensor, probabilities: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up * probabilities[:, None], rounded once: [tokens, width] in the dtype of `gate`.

    `gate` and `up` are [tokens, width] and may be halves of one tensor. `probabilities` is float32 [tokens], or None
    for ones.
    """
    return (swiglu_triton if gate.is_cuda else swiglu_torch)(gate, up, probabilities)


def swiglu_backward(
    grad_inner: Tensor, gate: Tensor, up: Tensor, probabilities: Tensor | None = None, out: Pair | None = None
) -> Gradients:
    """Return the gradients of `swiglu`, and its result recomputed: (grad_gate, grad_up, grad_probabilities, inner).

    grad_probabilities is float32 [tokens], or None without probabilities. The other tensors are [tokens, width] in the
    dtype of `gate`.

    Args:
        grad_inner: gradient of the result, [tokens, width].
        out: tensors for grad_gate and grad_up, such as the halves of one tensor. Default: new ones.
    """
    function = swiglu_backward_triton if gate.is_cuda else swiglu_backward_torch
    return function(grad_inner, gate, up, probabilities, out)


def swiglu_torch(gate: Tensor, up: Tensor, probabilities: Tensor | None = None) -> Tensor:
    """Reference of `swiglu_triton`."""
    inner = new_like(gate)
    for rows in row_blocks(*gate.shape):
        block = float_block(inner, rows)
        torch.ops.aten.silu.out(gate[rows].float(), out=block)
        block.mul_(up[rows].float())
        if probabilities is not None:
            block.mul_(probabilities[rows, None])
        store(inner, rows, block)
    return inner


def swiglu_backward_torch(
    grad_inner: Tensor, gate: Tensor, up: Tensor, probabilities: Tensor | None = None, out: Pair | None = None
) -> Gradients:
    """Reference of `swiglu_backward_triton`."""
    grad_gate, grad_up = out or (new_like(gate), new_like(up))
    inner = new_like(gate)
    grad_probabilities = None if probabilities is None else torch.empty_like(probabilities)
    for rows in row_blocks(*gate.shape):
        x, y, grad = gate[rows].float(), up[rows].float(), grad_inner[rows].float()
        silu = F.silu(x)
        gate_block, up_block, product = (float_block(target, rows) for target in (grad_gate, grad_up, inner))
        torch.mul(silu, y, out=product)
        if probabilities is None:
            torch.mul(grad, silu, out=up_block)
            torch.mul(grad, y, out=gate_block)
        else:
            assert grad_probabilities is not None
            scale = probabilities[rows, None]
            torch.sum(torch.mul(grad, product, out=up_block), 1, out=grad_probabilities[rows])
            product.mul_(scale)
            torch.mul(grad, scale, out=gate_block)
            torch.mul(gate_block, silu, out=up_block)
            gate_block.mul_(y)
        torch.ops.aten.silu_backward.grad_input(gate_block, x, grad_input=gate_block)
        for target, block in ((grad_gate, gate_block), (grad_up, up_block), (inner, product)):
            store(target, rows, block)
    return grad_gate, grad_up, grad_probabilities, inner


def swiglu_triton(gate: Tensor, up: Tensor, probabilities: Tensor | None = None) -> Tensor:
    """Make one pass: read gate and up, write inner."""
    gate, up, inner = dense_rows(gate), dense_rows(up), new_like(gate)
    tokens, width = gate.shape
    with torch.cuda.device_of(gate):
        _forward[(triton.cdiv(tokens, ROWS), triton.cdiv(width, COLUMNS))](
            gate, up, probabilities, inner, tokens, width, gate.stride(0), up.stride(0),
            ROWS, COLUMNS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return inner


def swiglu_backward_triton(
    grad_inner: Tensor, gate: Tensor, up: Tensor, probabilities: Tensor | None = None, out: Pair | None = None
) -> Gradients:
    """Make one pass: read grad_inner, gate and up; write their gradients and inner. A program computes full rows."""
    grad_inner, gate, up = (dense_rows(x) for x in (grad_inner, gate, up))
    grad_gate, grad_up = out or (new_like(gate), new_like(up))
    assert grad_gate.stride(1) == grad_up.stride(1) == 1, "the rows of `out` are not contiguous"
    inner = new_like(gate)
    grad_probabilities = None if probabilities is None else torch.empty_like(probabilities)
    tokens, width = gate.shape
    with torch.cuda.device_of(gate):
        _backward[(triton.cdiv(tokens, ROWS),)](
            grad_inner, gate, up, probabilities, grad_gate, grad_up, grad_probabilities, inner, tokens, width,
            grad_inner.stride(0), gate.stride(0), up.stride(0), grad_gate.stride(0), grad_up.stride(0),
            ROWS, COLUMNS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return grad_gate, grad_up, grad_probabilities, inner


@jit
def _forward(
    gate, up, probabilities, inner, tokens, width, gate_stride, up_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < tokens)[:, None] & (column < width)
    x = tl.load(gate + row[:, None] * gate_stride + column, mask, 0.0).to(tl.float32)
    y = tl.load(up + row[:, None] * up_stride + column, mask, 0.0).to(tl.float32)
    product = x * tl.sigmoid(x) * y
    if probabilities is not None:
        product *= tl.load(probabilities + row, row < tokens, 0.0)[:, None]
    tl.store(inner + row[:, None] * width + column, product, mask)


@jit
def _backward(
    grad_inner, gate, up, probabilities, grad_gate, grad_up, grad_probabilities, inner, tokens, width,
    grad_inner_stride, gate_stride, up_stride, grad_gate_stride, grad_up_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = row < tokens
    rows = row[:, None]
    probability_grads = tl.zeros([ROWS], tl.float32)
    if probabilities is not None:
        scale = tl.load(probabilities + row, row_mask, 0.0)[:, None]
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        mask = row_mask[:, None] & (column < width)
        grad = tl.load(grad_inner + rows * grad_inner_stride + column, mask, 0.0).to(tl.float32)
        x = tl.load(gate + rows * gate_stride + column, mask, 0.0).to(tl.float32)
        y = tl.load(up + rows * up_stride + column, mask, 0.0).to(tl.float32)
        sigmoid = tl.sigmoid(x)
        silu = x * sigmoid
        product = silu * y
        if probabilities is not None:
            probability_grads += tl.sum(grad * product, 1)
            product *= scale
            grad *= scale
        # The derivative of x sigmoid(x).
        slope = sigmoid + silu * (1 - sigmoid)
        tl.store(grad_gate + rows * grad_gate_stride + column, grad * y * slope, mask)
        tl.store(grad_up + rows * grad_up_stride + column, grad * silu, mask)
        tl.store(inner + rows * width + column, product, mask)
    if probabilities is not None:
        tl.store(grad_probabilities + row, probability_grads, row_mask)
