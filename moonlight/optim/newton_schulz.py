"""Newton-Schulz iteration: the approximate orthogonalization of Muon (arXiv 2502.16982, eq. 1).

Three implementations, by device and size:

- On a GPU in bfloat16, matrices of some size: steps on a shared Gram matrix (gram_newton_schulz.py).
- On a CPU, large matrices: one matrix at a time, in symmetric blocks (`_iterate_in_blocks`).
- All other matrices: the plain iteration on batches of one shape (`_iterate_batched`).
"""

import functools
from collections.abc import Sequence
from itertools import accumulate, chain, islice, repeat

import torch

from moonlight.optim import gram_newton_schulz as gram
from moonlight.optim.gram_newton_schulz import Coefficients
from moonlight.placement.owners import GRAM_FROM_SIDE, MAX_UPDATE_ELEMENTS

_MOONLIGHT = (3.4445, -4.7750, 2.0315)
COEFFICIENTS: dict[str, tuple[tuple[tuple[float, float, float], ...], tuple[float, float, float]]] = {
    "moonlight": ((), _MOONLIGHT),
    # Polar Express (arXiv 2505.16932), including its safety factor 1.01.
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
"""Name -> (coefficients (a, b, c) of the first steps, coefficients of every later step)."""

WORKSPACE_ELEMENTS = {"cpu": 2**19, "cuda": MAX_UPDATE_ELEMENTS, "meta": MAX_UPDATE_ELEMENTS}
"""Maximum number of elements of a batch of small matrices, by device. A step needs up to four times this, in its dtype.
On a CPU, the caches hold about this many. Also bounds the updates of one batch in both optimizers."""

BLOCKS_FROM_SIDE, BLOCKS_FROM_ELEMENTS = 256, 400_000
"""On a CPU, symmetric blocks compute matrices with at least this short side and this many elements."""

BLOCK_ROWS, MAX_BLOCKS = 192, 8
"""A symmetric product is split into at most MAX_BLOCKS blocks, of at least BLOCK_ROWS rows each."""


@torch.no_grad()
def orthogonalize(matrices: torch.Tensor, num_steps: int, coefficients: str, dtype: torch.dtype) -> torch.Tensor:
    """Return the approximate orthogonal factor of each matrix, in `dtype`: the singular values move towards 1.

    X0 = M / ||M||_F, then X <- a X + b (X X^T) X + c (X X^T)^2 X. A zero matrix stays zero.

    Args:
        matrices: [..., rows, columns] in any floating dtype.
        coefficients: a name in COEFFICIENTS.
        dtype: of the iteration; a GPU computes bfloat16 in float16 (see gram_newton_schulz.py).
    """
    steps = _steps(num_steps, coefficients)
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    if _by_gram(matrices, dtype):
        return gram.orthogonalize_batch([flat], [None], steps, dtype).reshape(matrices.shape)
    x = flat / (torch.linalg.matrix_norm(flat.float(), keepdim=True) + 1e-7)
    if not _in_blocks(matrices):
        _keep_freed_memory()
        x = x.to(dtype, memory_format=torch.contiguous_format)
        return _iterate_batched(x, steps).reshape(matrices.shape)
    tall = flat.shape[-2] > flat.shape[-1]  # iterate on the smaller Gram matrix
    done = [_iterate_in_blocks(matrix, steps) for matrix in (x.mT if tall else x).to(dtype)]
    x = done[0].unsqueeze(0) if len(done) == 1 else torch.stack(done)
    return (x.mT if tall else x).reshape(matrices.shape)


def _steps(num_steps: int, name: str) -> list[Coefficients]:
    first, then = COEFFICIENTS[name]
    return list(islice(chain(first, repeat(then)), num_steps))


def _by_gram(matrices: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return True for gram_newton_schulz.py: matrices of some size on a GPU, or on the meta device as if on a GPU."""
    return matrices.device.type != "cpu" and dtype is torch.bfloat16 and min(matrices.shape[-2:]) >= GRAM_FROM_SIDE


def _in_blocks(matrices: torch.Tensor) -> bool:
    """Return True if symmetric blocks are faster than batches: for large matrices on a CPU."""
    rows, columns = matrices.shape[-2:]
    large = min(rows, columns) >= BLOCKS_FROM_SIDE and rows * columns >= BLOCKS_FROM_ELEMENTS
    return large and matrices.device.type == "cpu"


@functools.cache
def _keep_freed_memory() -> None:
    """Make the C library reuse freed buffers; otherwise the first touch of new ones costs a quarter of a step.

    glibc returns blocks above a threshold to the system. The threshold grows with the largest block freed so far, up to
    32 MiB.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def _iterate_batched(x: torch.Tensor, steps: list[Coefficients]) -> torch.Tensor:
    """Return the plain iteration of a batch [count, rows, columns].

    Tall matrices are multiplied from the right, by X^T X, which avoids a transpose.
    """
    count, rows, columns = x.shape
    tall, n = rows > columns, min(rows, columns)
    gram, mixed = x.new_empty(2, count, n, n)
    other = torch.empty_like(x)
    for a, b, c in steps:
        torch.bmm(x.mT if tall else x, x if tall else x.mT, out=gram)
        mixed.copy_(gram).baddbmm_(gram, gram, beta=b, alpha=c)
        other.copy_(x).baddbmm_(*((x, mixed) if tall else (mixed, x)), beta=a)
        x, other = other, x
    return x


def _iterate_in_blocks(x: torch.Tensor, steps: list[Coefficients]) -> torch.Tensor:
    """Return the iteration of one matrix [n, m], n <= m, with two steps on each Gram matrix.

    A step multiplies X by a polynomial P of G = X X^T, and the next Gram matrix is P G P. All these matrices are
    symmetric and commute, so half of each is computed, and X is multiplied once for two steps. More steps without a new
    Gram matrix would lose the small singular values in bfloat16.

    Each symmetric matrix is stored as (scalar, rest) for scalar * I + rest. That rounds less, because X X^T approaches
    a multiple of I.
    """
    n = x.shape[0]
    gram, poly, half, next_gram, next_poly = x.new_empty(5, n, n)
    other = torch.empty_like(x)
    for step, second in _pair_steps(steps):
        rows = x[::8]  # a sample for the mean of the diagonal, which need not be exact
        g = rows.norm(dtype=torch.float32).square() / len(rows)
        g = g.to(x.dtype).item()
        gram.zero_().fill_diagonal_(-g)
        _add_product(gram, x, x.mT)
        p = _polynomial(poly, g, gram, step)
        if second is not None:
            torch.add(gram, poly, alpha=g / p, out=half)
            _add_product(half, poly, gram, beta=p)  # P G = p g I + half
            torch.add(half, poly, alpha=g, out=next_gram)
            _add_product(next_gram, poly, half, beta=p)  # P G P = p^2 g I + next_gram
            q = _polynomial(next_poly, p * p * g, next_gram, second)
            torch.add(poly, next_poly, alpha=p / q, out=half)
            _add_product(half, next_poly, poly, beta=q)  # Q P = q p I + half
            poly, half, p = half, poly, p * q
        torch.addmm(x, poly, x, beta=p, out=other)
        x, other = other, x
    return x


def _pair_steps(steps: list[Coefficients]) -> list[tuple[Coefficients, Coefficients | None]]:
    """Pair equal steps. The last step and unequal ones stay single: their pairs lost accuracy in bfloat16."""
    pairs: list[tuple[Coefficients, Coefficients | None]] = []
    while steps:
        second = steps[1] if len(steps) > 2 and steps[0] == steps[1] else None
        pairs.append((steps[0], second))
        steps = steps[2:] if second else steps[1:]
    return pairs


def _polynomial(out: torch.Tensor, g: float, gram: torch.Tensor, coefficients: Coefficients) -> float:
    """Write `out` and return p such that a I + b G + c G^2 = p I + out, for G = g I + gram.

    p is positive for all COEFFICIENTS.
    """
    a, b, c = coefficients
    out.copy_(gram)
    _add_product(out, gram, gram, beta=b + 2 * c * g, alpha=c)
    return a + b * g + c * g * g


def _add_product(
    out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> None:
    """out <- beta out + alpha left right for a symmetric result: compute the upper block triangle and mirror it."""
    rows = max(BLOCK_ROWS, -(-len(out) // MAX_BLOCKS))
    for start in range(0, len(out), rows):
        stop = start + rows
        out[start:stop, start:].addmm_(left[start:stop], right[:, start:], beta=beta, alpha=alpha)
        out[stop:, start:stop] = out[start:stop, stop:].mT


@torch.no_grad()
def orthogonalize_all(
    matrices: Sequence[torch.Tensor],
    num_steps: int,
    coefficients: str,
    dtype: torch.dtype,
    norms: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Orthogonalize many tensors [..., rows, columns] in `dtype`, with small matrices of one shape in batches.

    Args:
        coefficients: a name in COEFFICIENTS.
        norms: for each tensor, the Frobenius norms of its matrices, float32 [number of matrices], if a previous pass on
            a GPU computed them.

    Returns:
        Tensors of the same shapes, in the same order.
    """
    results: list[list[torch.Tensor]] = [[] for _ in matrices]
    by_shape: dict[tuple[torch.device, int, int], list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault((matrix.device, *matrix.shape[-2:]), []).append(index)
    for (_, rows, columns), indices in by_shape.items():
        limit = _largest_batch(matrices[indices[0]])
        parts: list[tuple[int, torch.Tensor, torch.Tensor | None]] = []
        for index in indices:
            split = matrices[index].reshape(-1, rows, columns).split(limit)
            split_norms = [None] * len(split) if norms is None else norms[index].split(limit)
            parts += zip(repeat(index), split, split_norms, strict=False)
        while parts:
            lengths = accumulate(len(part) for _, part, _ in parts)
            count = max(1, sum(length <= limit for length in lengths))
            batch, parts = parts[:count], parts[count:]
            sources = [part for _, part, _ in batch]
            if _by_gram(sources[0], dtype):
                batch_norms = [norm for *_, norm in batch]
                result = gram.orthogonalize_batch(sources, batch_norms, _steps(num_steps, coefficients), dtype)
            else:
                joined = sources[0] if count == 1 else torch.cat(sources)
                result = orthogonalize(joined, num_steps, coefficients, dtype)
            for (index, *_), part in zip(batch, result.split([len(source) for source in sources]), strict=True):
                results[index].append(part)
    return [
        (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(matrix.shape)
        for matrix, parts in zip(matrices, results, strict=True)
    ]


def _largest_batch(matrices: torch.Tensor) -> int:
    """Return the maximum number of matrices of this shape in a batch."""
    rows, columns = matrices.shape[-2:]
    return 1 if _in_blocks(matrices) else max(1, WORKSPACE_ELEMENTS[matrices.device.type] // (rows * columns))
