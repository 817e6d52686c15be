"""Orthogonalisation of matrices by Newton-Schulz iteration: the heart of Muon (arXiv 2502.16982, eq. 1)."""

import functools
from collections.abc import Sequence
from itertools import accumulate, chain, islice, repeat

import torch

from moonlight.optim import gram_newton_schulz as gram
from moonlight.optim.gram_newton_schulz import Coefficients
from moonlight.placement.owners import AT_ONCE, GRAM_FROM_SIDE

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

WORKSPACE_ELEMENTS = {"cpu": 2**19, "cuda": AT_ONCE, "meta": AT_ONCE}
"""Most elements of small matrices orthogonalised at once; a step needs up to four times this in its dtype."""

BLOCKS_FROM_SIDE, BLOCKS_FROM_ELEMENTS = 256, 400_000
"""On a CPU, matrices with at least this short side and this many elements are computed in symmetric blocks."""

BLOCK_ROWS, MAX_BLOCKS = 192, 8
"""A symmetric product is cut into blocks of at least this many rows, and at most so many blocks."""


@torch.no_grad()
def orthogonalize(matrices: torch.Tensor, num_steps: int, coefficients: str, dtype: torch.dtype) -> torch.Tensor:
    """The orthogonal factor of each matrix, approximately: singular values are driven towards 1.

    X0 = M / ||M||_F, then X <- a X + b (X X^T) X + c (X X^T)^2 X. `matrices` [..., rows, columns] in any dtype,
    computed in `dtype`, or in float16 where a GPU is asked for bfloat16 (see gram.py); a zero matrix stays zero. The
    result has `dtype`.
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
    """Whether gram.py takes them: matrices of some size on a GPU, or on the meta device as if it were one."""
    return matrices.device.type != "cpu" and dtype is torch.bfloat16 and min(matrices.shape[-2:]) >= GRAM_FROM_SIDE


def _in_blocks(matrices: torch.Tensor) -> bool:
    """Whether symmetric blocks are faster than batching: for large matrices on a CPU."""
    rows, columns = matrices.shape[-2:]
    large = min(rows, columns) >= BLOCKS_FROM_SIDE and rows * columns >= BLOCKS_FROM_ELEMENTS
    return large and matrices.device.type == "cpu"


@functools.cache
def _keep_freed_memory() -> None:
    """Have the C library keep freed buffers for the next ones; their first touch costs a quarter of a step otherwise.

    glibc returns blocks to the system above a size that grows with the largest one freed so far, up to 32 MiB.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def _iterate_batched(x: torch.Tensor, steps: list[Coefficients]) -> torch.Tensor:
    """The iteration as it is written, for a batch [count, rows, columns]; tall matrices are multiplied from the right,
    with X^T X, which saves transposing them."""
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
    """The iteration on one matrix [n, m], n <= m, two steps at a time on its Gram matrix.

    A step multiplies X by a polynomial P of G = X X^T, and the next Gram matrix is P G P. All of these are symmetric
    and commute, so half of each is computed, and X is multiplied once for two steps. More steps without a new Gram
    matrix would lose the small singular values in bfloat16. Each of them is kept as (scalar, rest), the matrix
    scalar * I + rest, which rounds less: near the end X X^T is almost a multiple of I.
    """
    n = x.shape[0]
    gram, poly, half, next_gram, next_poly = x.new_empty(5, n, n)
    other = torch.empty_like(x)
    for step, second in _in_twos(steps):
        rows = x[::8]  # enough of them for the mean of the diagonal, which need not be exact
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


def _in_twos(steps: list[Coefficients]) -> list[tuple[Coefficients, Coefficients | None]]:
    """Equal steps two by two, but the last one and changing ones alone: their pairs lost accuracy in bfloat16."""
    taken: list[tuple[Coefficients, Coefficients | None]] = []
    while steps:
        second = steps[1] if len(steps) > 2 and steps[0] == steps[1] else None
        taken.append((steps[0], second))
        steps = steps[2:] if second else steps[1:]
    return taken


def _polynomial(out: torch.Tensor, g: float, gram: torch.Tensor, coefficients: Coefficients) -> float:
    """a I + b G + c G^2 = p I + out for G = g I + gram; returns p, which is positive for all our coefficients."""
    a, b, c = coefficients
    out.copy_(gram)
    _add_product(out, gram, gram, beta=b + 2 * c * g, alpha=c)
    return a + b * g + c * g * g


def _add_product(
    out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> None:
    """out <- beta out + alpha left right, where that is symmetric: the upper block triangle, mirrored."""
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
    """Orthogonalise many tensors [..., rows, columns] in `dtype`, batching small matrices of one shape.

    `norms`: Frobenius norms, float32 [number of matrices] for each tensor, where a GPU has them from another pass.
    """
    done: list[list[torch.Tensor]] = [[] for _ in matrices]
    by_shape: dict[tuple[torch.device, int, int], list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault((matrix.device, *matrix.shape[-2:]), []).append(index)
    for (_, rows, columns), indices in by_shape.items():
        limit = _largest_batch(matrices[indices[0]])
        flat = {index: matrices[index].reshape(-1, rows, columns) for index in indices}
        parts: list[tuple[int, torch.Tensor, torch.Tensor | None]] = []
        for index in indices:
            own_parts = flat[index].split(limit)
            own_norms = [None] * len(own_parts) if norms is None else norms[index].split(limit)
            parts += zip(repeat(index), own_parts, own_norms, strict=False)
        while parts:
            lengths = accumulate(len(part) for _, part, _ in parts)
            count = max(1, sum(length <= limit for length in lengths))
            batch, parts = parts[:count], parts[count:]
            sources = [part for _, part, _ in batch]
            if _by_gram(sources[0], dtype):
                known = [norm for *_, norm in batch]
                result = gram.orthogonalize_batch(sources, known, _steps(num_steps, coefficients), dtype)
            else:
                whole = sources[0] if count == 1 else torch.cat(sources)
                result = orthogonalize(whole, num_steps, coefficients, dtype)
            for (index, *_), own in zip(batch, result.split([len(part) for part in sources]), strict=True):
                done[index].append(own)
    return [
        (own[0] if len(own) == 1 else torch.cat(own)).reshape(matrix.shape)
        for matrix, own in zip(matrices, done, strict=True)
    ]


def _largest_batch(matrices: torch.Tensor) -> int:
    """How many matrices of this shape to orthogonalise at once."""
    rows, columns = matrices.shape[-2:]
    return 1 if _in_blocks(matrices) else max(1, WORKSPACE_ELEMENTS[matrices.device.type] // (rows * columns))
