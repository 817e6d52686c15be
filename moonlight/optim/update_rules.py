"""The update rules of Muon and AdamW as functions of lists of tensors. Both optimizers of this package call them.

All arithmetic is float32. `scale` multiplies gradients on input (clipping), never in place.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

Tensors = list[torch.Tensor]
Item = TypeVar("Item")

RMS_MATCHINGS = ("adjusted_lr", "update_norm", "baseline")
"""See `rms_match_scale`."""


def can_fuse(tensors: Iterable[torch.Tensor]) -> bool:
    """Return True if the kernels of `moonlight.kernels.muon_update` accept the tensors: contiguous, on a GPU."""
    return all(tensor.is_cuda and tensor.is_contiguous() for tensor in tensors)


def batch_by_elements(items: Iterable[Item], num_elements: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Yield batches of consecutive items with at most `limit` elements in all; a larger item is a batch of its own.

    An update of one batch at a time bounds the memory of its temporary tensors.
    """
    batch: list[Item] = []
    elements = 0
    for item in items:
        if batch and elements + num_elements(item) > limit:
            yield batch
            batch, elements = [], 0
        batch.append(item)
        elements += num_elements(item)
    if batch:
        yield batch


@torch.no_grad()
def update_momentum(grads: Tensors, momenta: Tensors, *, momentum: float, nesterov: bool, scale: float) -> Tensors:
    """Update the momenta, M <- mu M + s G, and return the directions to orthogonalize.

    A direction is s G + mu M, or M without Nesterov: a new float32 tensor. Gradients have any floating dtype. Momenta
    are float32 or bfloat16; bfloat16 momenta are rounded once, after the sum.
    """
    if not momenta:
        return []
    scaled = [grad.float() for grad in grads]
    if scale != 1:
        scaled = list(torch._foreach_mul(scaled, scale))
    sums = [m.float() for m in momenta]  # no copy if already float32
    # Two roundings. A fused operation rounds once, but not at the end of a vector, so results would depend on sharding.
    torch._foreach_mul_(sums, momentum)
    torch._foreach_add_(sums, scaled)
    for stored, exact in zip(momenta, sums, strict=True):
        if stored is not exact:
            stored.copy_(exact)
    return list(torch._foreach_add(scaled, sums, alpha=momentum)) if nesterov else [s.clone() for s in sums]


@torch.no_grad()
def update_momentum_norms(
    grads: Tensors, momenta: Tensors, matrix_elements: Sequence[int], *, momentum: float, nesterov: bool, scale: float
) -> tuple[Tensors, Tensors | None]:
    """Return `update_momentum`'s directions, and the Frobenius norm of each matrix in them.

    On a GPU, one fused pass computes both. Elsewhere the norms are None.

    Args:
        matrix_elements: for each tensor, the number of elements of one of its matrices.

    Returns:
        The directions, and for each of them the norms, float32 [number of matrices].
    """
    if not grads or not can_fuse([*grads, *momenta]):
        return update_momentum(grads, momenta, momentum=momentum, nesterov=nesterov, scale=scale), None
    from moonlight.kernels.muon_update import fused_momentum

    results = [
        fused_momentum(grad, stored, elements, factor=momentum, nesterov=nesterov, scale=scale)
        for grad, stored, elements in zip(grads, momenta, matrix_elements, strict=True)
    ]
    return [direction for direction, _ in results], [norms for _, norms in results]


def rms_match_scale(
    rows: int, columns: int, rms_match: float, rms_matching: str = "adjusted_lr", hidden_size: int = 0
) -> float:
    """Return the factor that gives an orthogonal update the RMS of AdamW's (arXiv 2502.16982, eq. 4 and section 3.1).

    `rows` and `columns` are those of the full matrix. By `rms_matching`:

    - adjusted_lr: rms_match * sqrt(max(rows, columns)).
    - baseline: rms_match * sqrt(hidden_size), the same for all matrices.
    - update_norm: rms_match, for an update that `normalize_rms_` has normalized.
    """
    if rms_matching == "update_norm":
        return rms_match
    return rms_match * (hidden_size if rms_matching == "baseline" else max(rows, columns)) ** 0.5


@torch.no_grad()
def normalize_rms_(updates: Tensors) -> Tensors:
    """Divide each matrix of tensors [..., rows, columns] by its RMS, in place. Pass full matrices; zeros stay zero."""
    for update in updates:
        norms = torch.linalg.matrix_norm(update.float(), keepdim=True)
        update.div_((norms / math.sqrt(update.shape[-2] * update.shape[-1])).clamp_(min=1e-30))
    return updates


@torch.no_grad()
def adamw_updates(
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    scale: float,
) -> Tensors:
    """Update AdamW's two moments and return its updates, before learning rate and weight decay.

    All tensors are float32; the updates are new ones. `step` counts from 1.
    """
    scaled = torch._foreach_mul(grads, scale)
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
    """W <- W - lr (U + wd W) in place, with decoupled weight decay."""
    if not weights:
        return
    torch._foreach_mul_(weights, 1 - learning_rate * weight_decay)
    torch._foreach_add_(weights, updates, alpha=-learning_rate)
