"""Fused element-wise passes of an update: momentum before Newton-Schulz, weights after it.

Every operation is float32 and rounds like its torch reference in `moonlight.optim.update_rules` and
`moonlight.optim.master_weights`. These modules also select the reference or the kernel.

Multiplications and additions round separately, except for sums with a factor, which torch fuses (`tl.fma` here).
`enable_fp_fusion=False` prevents the compiler from fusing others.
"""

from __future__ import annotations  # kernels use `tl.constexpr`, which does not exist without Triton

import torch
from torch import Tensor

from moonlight.kernels.jit import jit, tl, triton

BLOCK = 4096
"""Elements per program."""
NUM_WARPS = 8


def fused_momentum(
    grad: Tensor, momentum: Tensor, matrix_elements: int, *, factor: float, nesterov: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Update a momentum; return the direction of `update_rules.update_momentum` and the Frobenius norm of each matrix.

    Args:
        grad: any shape and floating dtype, contiguous: consecutive matrices of `matrix_elements` elements.
        momentum: float32 or bfloat16, contiguous, updated in place.
        factor: mu of the momentum.
        scale: multiplies the gradient (clipping).

    Returns:
        The direction, float32 in the shape of `grad`, and the norms, float32 [matrices]. The order of their sums
        depends on `matrix_elements` alone.
    """
    count, blocks = grad.numel() // matrix_elements, triton.cdiv(matrix_elements, BLOCK)
    assert count * matrix_elements == grad.numel() == momentum.numel(), (grad.shape, matrix_elements)
    assert grad.is_contiguous() and momentum.is_contiguous(), (grad.stride(), momentum.stride())
    direction = torch.empty_like(grad, dtype=torch.float32)
    squares = torch.empty(count, blocks, dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):
        _momentum_kernel[(count * blocks,)](
            grad, momentum, direction, squares, matrix_elements, scale, factor,
            NESTEROV=nesterov, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return direction, squares.sum(-1).sqrt()


@jit
def _momentum_kernel(
    grad, momentum, direction, squares, elements, scale, factor,
    NESTEROV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(elements, BLOCK)
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    inside = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = inside < elements
    offsets = matrix * elements + inside
    scaled = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32) * scale
    updated = tl.load(momentum + offsets, mask=mask, other=0.0).to(tl.float32) * factor
    updated = updated + scaled
    tl.store(momentum + offsets, updated.to(momentum.dtype.element_ty), mask=mask)
    result = tl.fma(updated, factor, scaled) if NESTEROV else updated
    tl.store(direction + offsets, result, mask=mask)
    tl.store(squares + tl.program_id(0), tl.sum(result * result, axis=0))


def normalize_pass(direction: Tensor, norms: Tensor, out: Tensor) -> None:
    """out <- direction / (norm + 1e-7), in float32 and rounded once.

    `direction` (any floating dtype) and `out` are contiguous [matrices, ...], `norms` float32 [matrices].
    """
    assert direction.is_contiguous() and out.is_contiguous() and direction.numel() == out.numel(), direction.stride()
    elements = direction.numel() // len(norms)
    blocks = triton.cdiv(elements, BLOCK)
    with torch.cuda.device_of(out):
        _normalize_kernel[(len(norms) * blocks,)](
            direction, norms, out, elements, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False
        )


@jit
def _normalize_kernel(direction, norms, out, elements, BLOCK: tl.constexpr):
    blocks = tl.cdiv(elements, BLOCK)
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    inside = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = inside < elements
    offsets = matrix * elements + inside
    length = tl.load(norms + matrix) + 1e-7
    values = tl.load(direction + offsets, mask=mask, other=0.0).to(tl.float32)
    values = tl.div_rn(values, tl.zeros_like(values) + length)
    tl.store(out + offsets, values.to(out.dtype.element_ty), mask=mask)


def fused_weight_update(
    master: Tensor | None,
    weights: Tensor,
    remainder: Tensor | None,
    update: Tensor,
    *,
    factor: float,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """W <- W - lr (factor update + wd W), rounded into the model.

    The references are `update_rules.apply_updates` and `master_weights.MasterWeight`. All tensors are contiguous and of
    one shape. All except `update` are updated in place.

    Args:
        master: float32 master weights of bfloat16 `weights`, or None.
        weights: the model's weights: float32, or bfloat16 with `master` or `remainder`.
        remainder: int16 low halves of split master weights, or None.
        update: any floating dtype.
    """
    assert (weights.dtype is torch.float32) == (master is None and remainder is None), weights.dtype
    assert master is None or remainder is None
    optional = [tensor for tensor in (master, remainder, update) if tensor is not None]
    assert all(tensor.is_contiguous() and tensor.numel() == weights.numel() for tensor in [weights, *optional])
    with torch.cuda.device_of(weights):
        _weights_kernel[(triton.cdiv(weights.numel(), BLOCK),)](
            weights if master is None else master, weights, weights if remainder is None else remainder, update,
            weights.numel(), factor, -learning_rate, 1 - learning_rate * weight_decay,
            SPLIT=remainder is not None, COPIED=master is not None,
            BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


@jit
def _weights_kernel(
    master, weights, remainder, update, elements, factor, rate, decay,
    SPLIT: tl.constexpr, COPIED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < elements
    if SPLIT:
        high = tl.load(weights + offsets, mask=mask, other=0.0).to(tl.int16, bitcast=True).to(tl.int32) << 16
        low = tl.load(remainder + offsets, mask=mask, other=0).to(tl.int32)
        values = (high + low).to(tl.float32, bitcast=True)
    else:
        values = tl.load(master + offsets, mask=mask, other=0.0)
    scaled = tl.load(update + offsets, mask=mask, other=0.0).to(tl.float32) * factor
    values = tl.fma(scaled, rate, values * decay)
    if SPLIT or COPIED:
        bits = values.to(tl.int32, bitcast=True) + 0x8000
        tl.store(weights + offsets, (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
    if SPLIT:
        tl.store(remainder + offsets, ((bits & 0xFFFF) - 0x8000).to(tl.int16), mask=mask)
    else:
        tl.store(master + offsets, values, mask=mask)
