"""The element-wise passes of an update over large tensors: momentum before Newton-Schulz, weights after it.

Every operation is float32 and rounds as its torch reference in `moonlight.optim.update_rules` and
`moonlight.optim.master_weights`, which also choose between the two. Multiplications and additions round separately,
except sums with a factor, which torch fuses (`tl.fma` here); `enable_fp_fusion=False` keeps the compiler from fusing
others.
"""

from __future__ import annotations  # kernels name `tl.constexpr`, which is not there without Triton

import torch

from moonlight.kernels.jit import jit, tl, triton

BLOCK = 4096
"""Elements of a program."""
NUM_WARPS = 8

Tensor = torch.Tensor


def fused_momentum(
    gradient: Tensor, momentum: Tensor, matrix_elements: int, *, factor: float, nesterov: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Advance a momentum and return what `rules.muon_directions` returns, with the Frobenius norm of each matrix.

    Args:
        gradient: any shape and floating dtype, contiguous: matrices of `matrix_elements` one after another.
        momentum: float32 or bfloat16, contiguous, changed.

    Returns:
        The direction, float32 of the gradient's shape, and float32 [matrices], summed in an order that depends on
        `matrix_elements` alone.
    """
    count, blocks = gradient.numel() // matrix_elements, triton.cdiv(matrix_elements, BLOCK)
    assert count * matrix_elements == gradient.numel() == momentum.numel(), (gradient.shape, matrix_elements)
    assert gradient.is_contiguous() and momentum.is_contiguous(), (gradient.stride(), momentum.stride())
    direction = torch.empty_like(gradient, dtype=torch.float32)
    squares = torch.empty(count, blocks, dtype=torch.float32, device=gradient.device)
    with torch.cuda.device_of(gradient):
        _momentum_kernel[(count * blocks,)](
            gradient, momentum, direction, squares, matrix_elements, scale, factor,
            NESTEROV=nesterov, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return direction, squares.sum(-1).sqrt()


@jit
def _momentum_kernel(
    gradient, momentum, direction, squares, elements, scale, factor,
    NESTEROV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(elements, BLOCK)
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    inside = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = inside < elements
    offsets = matrix * elements + inside
    scaled = tl.load(gradient + offsets, mask=mask, other=0.0).to(tl.float32) * scale
    moved = tl.load(momentum + offsets, mask=mask, other=0.0).to(tl.float32) * factor
    moved = moved + scaled
    tl.store(momentum + offsets, moved.to(momentum.dtype.element_ty), mask=mask)
    result = tl.fma(moved, factor, scaled) if NESTEROV else moved
    tl.store(direction + offsets, result, mask=mask)
    tl.store(squares + tl.program_id(0), tl.sum(result * result, axis=0))


def normalize_pass(direction: Tensor, norms: Tensor, out: Tensor) -> None:
    """out <- direction / (norm + 1e-7), in float32 and rounded once.

    Directions in any floating dtype and `out` are contiguous [matrices, ...], norms float32 [matrices].
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
    """W <- W - lr (factor update + wd W) as in `rules.apply_updates`, and the model's copy as in `master.Master`.

    Args:
        master: float32 master weights beside bfloat16 `weights`, or None.
        weights: the model's own: float32, or bfloat16 with `master` or `remainder`.
        remainder: int16, the other half of split master weights, or None.
        update: any floating dtype.

    All are contiguous and of one shape, and all but `update` are changed.
    """
    assert (weights.dtype is torch.float32) == (master is None and remainder is None), weights.dtype
    assert master is None or remainder is None
    others = [tensor for tensor in (master, remainder, update) if tensor is not None]
    assert all(tensor.is_contiguous() and tensor.numel() == weights.numel() for tensor in [weights, *others])
    with torch.cuda.device_of(weights):
        _weights_kernel[(triton.cdiv(weights.numel(), BLOCK),)](
            weights if master is None else master,
            weights,
            weights if remainder is None else remainder,
            update,
            weights.numel(),
            factor,
            -learning_rate,
            1 - learning_rate * weight_decay,
            SPLIT=remainder is not None,
            COPIED=master is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )


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
