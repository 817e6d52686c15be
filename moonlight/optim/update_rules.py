"""The update rules of Muon and AdamW for lists of tensors: what every optimizer here applies to what it holds.

All arithmetic is float32. Gradients are scaled on the way in (clipping), never in place.
"""

import math
from collections.abc import Iterable, Sequence

import torch

Tensors = list[torch.Tensor]

RMS_MATCHINGS = ("adjusted_lr", "update_norm", "baseline")
"""See `rms_match_scale`."""


def can_fuse(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether the kernels of `moonlight.kernels.muon_update` take them: contiguous ones on a GPU."""
    return all(tensor.is_cuda and tensor.is_contiguous() for tensor in tensors)


@torch.no_grad()
def update_momentum(gradients: Tensors, momenta: Tensors, *, momentum: float, nesterov: bool, scale: float) -> Tensors:
    """Advance the momenta, M <- mu M + s G, and return what is to be orthogonalised: s G + mu M, or M without Nesterov.

    Momenta are float32 or bfloat16; bfloat16 ones are rounded once, after the sum. Gradients have any floating dtype.
    The result is float32 and new.
    """
    if not momenta:
        return []
    scaled = [gradient.float() for gradient in gradients]
    if scale != 1:
        scaled = list(torch._foreach_mul(scaled, scale))
    sums = [m.float() for m in momenta]  # float32 momenta themselves, and copies of others
    # Two roundings, not the one of a fused operation, which differs where vectors end: every cut gives the same bits.
    torch._foreach_mul_(sums, momentum)
    torch._foreach_add_(sums, scaled)
    for own, exact in zip(momenta, sums, strict=True):
        if own is not exact:
            own.copy_(exact)
    return list(torch._foreach_add(scaled, sums, alpha=momentum)) if nesterov else [s.clone() for s in sums]


@torch.no_grad()
def update_momentum_norms(
    gradients: Tensors,
    momenta: Tensors,
    matrix_elements: Sequence[int],
    *,
    momentum: float,
    nesterov: bool,
    scale: float,
) -> tuple[Tensors, Tensors | None]:
    """`update_momentum`; on a GPU in one pass, which also gives the Frobenius norms of the matrices in each tensor.

    `matrix_elements`: of one matrix of each tensor. Norms are float32 [number of matrices], or None where the pass does
    not give them.
    """
    if not gradients or not can_fuse([*gradients, *momenta]):
        return update_momentum(gradients, momenta, momentum=momentum, nesterov=nesterov, scale=scale), None
    from moonlight.kernels.muon_update import fused_momentum

    passes = [
        fused_momentum(gradient, own, elements, factor=momentum, nesterov=nesterov, scale=scale)
        for gradient, own, elements in zip(gradients, momenta, matrix_elements, strict=True)
    ]
    return [direction for direction, _ in passes], [norms for _, norms in passes]


def rms_match_scale(
    rows: int, columns: int, rms_match: float, rms_matching: str = "adjusted_lr", hidden_size: int = 0
) -> float:
    """Factor of an orthogonal update that gives it the RMS of AdamW's (arXiv 2502.16982, eq. 4 and section 3.1).

    adjusted_lr: rms_match * sqrt(max(rows, columns)), from its shape; baseline: rms_match * sqrt(hidden_size), the same
    for all; update_norm: rms_match, of an update that `normalize_rms_` has seen.
    """
    if rms_matching == "update_norm":
        return rms_match
    return rms_match * (hidden_size if rms_matching == "baseline" else max(rows, columns)) ** 0.5


@torch.no_grad()
def normalize_rms_(updates: Tensors) -> Tensors:
    """Divide each matrix of tensors [..., rows, columns] by its RMS, in place: whole matrices only. Zeros stay zero."""
    for update in updates:
        norms = torch.linalg.matrix_norm(update.float(), keepdim=True)
        update.div_((norms / math.sqrt(update.shape[-2] * update.shape[-1])).clamp_(min=1e-30))
    return updates


@torch.no_grad()
def adamw_updates(
    gradients: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    scale: float,
) -> Tensors:
    """Advance AdamW's two float32 moments and return its update, before learning rate and decay; `step` from 1."""
    scaled = torch._foreach_mul(gradients, scale)
    torch._foreach_lerp_(exp_avgs, scaled, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, scaled, scaled, 1 - beta2)
    denominators = torch._foreach_div(exp_avg_sqs, 1 - beta2**step)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, eps)
    updates = torch._foreach_div(exp_avgs, 1 - beta1**step)
    torch._foreach_div_(updates, denominators)
    return list(updates)


@torch.no_grad()
def apply_updates(weights: Tensors, updates: Tensors, *, learning_rate: float, weight_decay: float) -> None:
    """W <- W - lr (U + wd W), decoupled decay."""
    if not weights:
        return
    torch._foreach_mul_(weights, 1 - learning_rate * weight_decay)
    torch._foreach_add_(weights, updates, alpha=-learning_rate)
