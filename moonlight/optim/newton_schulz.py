"""Orthogonalisation of matrices by Newton-Schulz iteration: the heart of Muon (arXiv 2502.16982, eq. 1)."""

from collections.abc import Sequence
from itertools import chain, repeat

import torch

_MOONLIGHT = (3.4445, -4.7750, 2.0315)
COEFFICIENTS: dict[str, tuple[tuple[tuple[float, float, float], ...], tuple[float, float, float]]] = {
    "moonlight": ((), _MOONLIGHT),
    # Polar Express (arXiv 2505.16932), its safety factor 1.01 folded in.
    "polar_express": (
        (
            (8.2051, -22.9019, 16.4607),
            (4.0664, -2.8612, 0.5184),
            (3.9096, -2.8234, 0.5250),
            (3.2856, -2.4153, 0.4853),
            (2.2779, -1.6198, 0.3985),
            (1.8726, -1.2307, 0.3585),
            (1.8564, -1.2132, 0.3568),
        ),
        (1.875, -1.25, 0.375),
    ),
    "deepseekv4": ((_MOONLIGHT,) * 8, (2.0, -1.5, 0.5)),
}
"""Name -> (coefficients (a, b, c) of the first steps, those of every later step)."""

BATCH_BELOW = 256
"""On a CPU, batching same-shape matrices pays only while their short side is below this."""

WORKSPACE_ELEMENTS = 2**26
"""Most elements orthogonalised at once; a step needs about four times this in its dtype."""


@torch.no_grad()
def orthogonalize(matrices: torch.Tensor, num_steps: int, coefficients: str, dtype: torch.dtype) -> torch.Tensor:
    """The orthogonal factor of each matrix, approximately: singular values are driven towards 1.

    X0 = M / ||M||_F, then X <- a X + b (X X^T) X + c (X X^T)^2 X. `matrices` [..., rows, columns] in any dtype,
    computed in `dtype`; a zero matrix stays zero. The result has `dtype`.
    """
    first, then = COEFFICIENTS[coefficients]
    transposed = matrices.shape[-2] > matrices.shape[-1]  # iterate on the smaller Gram matrix
    x = matrices.mT if transposed else matrices
    x = (x / (torch.linalg.matrix_norm(x.float(), keepdim=True) + 1e-7)).to(dtype)
    batched = x if x.dim() == 3 else x.flatten(0, -3) if x.dim() > 3 else x.unsqueeze(0)
    for (a, b, c), _ in zip(chain(first, repeat(then)), range(num_steps), strict=False):
        gram = batched @ batched.mT
        mixed = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        batched = torch.baddbmm(batched, mixed, batched, beta=a)
    x = batched.view(x.shape)
    return x.mT if transposed else x


def orthogonalize_all(
    matrices: Sequence[torch.Tensor], num_steps: int, coefficients: str, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Orthogonalise many tensors [..., rows, columns], batching those of one shape where that is faster."""
    results: list[torch.Tensor | None] = [None] * len(matrices)
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault((matrix.shape[-2], matrix.shape[-1]), []).append(index)
    for (rows, columns), indices in by_shape.items():
        on_cpu = matrices[indices[0]].device.type == "cpu"
        limit = 1 if on_cpu and min(rows, columns) >= BATCH_BELOW else max(1, WORKSPACE_ELEMENTS // (rows * columns))
        flat = [matrices[index].reshape(-1, rows, columns) for index in indices]
        units = [unit for tensor in flat for unit in tensor.split(limit)]
        done: list[torch.Tensor] = []
        while units:
            batch = [units.pop(0)]
            while units and sum(map(len, batch)) + len(units[0]) <= limit:
                batch.append(units.pop(0))
            result = orthogonalize(torch.cat(batch), num_steps, coefficients, dtype)
            done.extend(result.split([len(unit) for unit in batch]))
        whole = torch.cat(done)
        for index, part in zip(indices, whole.split([len(tensor) for tensor in flat]), strict=True):
            results[index] = part.view(matrices[index].shape)
    return [result for result in results if result is not None]
