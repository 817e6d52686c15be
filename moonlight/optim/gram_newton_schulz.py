"""Newton-Schulz of batches on a GPU: several steps on one Gram matrix, in float16, half of symmetric products computed.

A step multiplies X by a polynomial P of G = X X^T (of X^T X from the right, if X is tall), and the next Gram matrix is
P G P: all of these are symmetric and commute. So k steps can share one new Gram matrix and one product with X, for
3 n^2 m + (4k - 3) n^3 operations if symmetric products cost half; k steps on X itself take k (3 n^2 m + n^3). Sharing
is cheaper wherever X is not square. On a CPU bfloat16 is the fast dtype, and other steps are safe (newton_schulz.py).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

Coefficients = tuple[float, float, float]
Product = Callable[..., None]


def group_steps(steps: Sequence[Coefficients], rows: int, columns: int) -> list[list[Coefficients]]:
    """Which steps share a Gram matrix: three if they are equal, else two; each has its own if X is square.

    A rounding error of G counts most where G is small, and the steps of a segment amplify it: float16 bears three of
    Moonlight's, or two of Polar Express, whose first ones are steep (three gave infinities). In bfloat16 even two lose
    more than the plain loop does.
    """
    if rows == columns:
        return [[step] for step in steps]
    taken: list[list[Coefficients]] = []
    rest = list(steps)
    while rest:
        count = 3 if len(set(rest[:3])) == 1 else 2
        taken.append(rest[:count])
        rest = rest[count:]
    return taken


def run_steps(x: torch.Tensor, steps: Sequence[Coefficients], product: Product) -> torch.Tensor:
    """All steps on float16 X0 [count, rows, columns]; let nobody else hold it, then its memory is used again.

    `product` is `kernels.symmetric.symmetric_product`, or what computes the same.
    """
    _, rows, columns = x.shape
    with _float32_sums():
        for segment in group_steps(steps, rows, columns):
            polynomial = _polynomial(x.mT if rows > columns else x, segment, product)
            x = torch.bmm(x, polynomial) if rows > columns else torch.bmm(polynomial, x)
            del polynomial
    return x


@contextlib.contextmanager
def _float32_sums() -> Iterator[None]:
    """Torch lets cuBLAS add parts of float16 products in float16 unless told otherwise; other code may want that."""
    flags = torch.backends.cuda.matmul
    before = (flags.allow_fp16_reduced_precision_reduction, flags.allow_fp16_reduced_precision_reduction_split_k)
    flags.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        flags.allow_fp16_reduced_precision_reduction = before


def _polynomial(x: torch.Tensor, steps: Sequence[Coefficients], product: Product) -> torch.Tensor:
    """The symmetric matrices [count, n, n] by which X [count, n, m] is multiplied in these steps.

    Four such matrices are there at once, two if there is one step: `moonlight plan` counts on it.
    """
    count, n, _ = x.shape
    gram = x.new_empty(count, n, n)
    product(x, x.mT, gram)
    whole = None
    for number, (a, b, c) in enumerate(steps, 1):
        polynomial = torch.empty_like(gram)
        product(gram, gram, polynomial, alpha=c, added=gram, beta=b, gamma=a)
        if number < len(steps):
            half = torch.empty_like(gram)
            product(polynomial, gram, half)
            product(half, polynomial, gram)
            del half
        if whole is None:
            whole = polynomial
        else:
            joined = torch.empty_like(gram)
            product(polynomial, whole, joined)
            whole = joined
    assert whole is not None, "no steps"
    return whole


def orthogonalize_batch(
    sources: Sequence[torch.Tensor],
    norms: Sequence[torch.Tensor | None],
    steps: Sequence[Coefficients],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Orthogonalise matrices of one shape on a GPU: tensors [count, rows, columns], together [all, rows, columns] in
    `dtype`. `norms`: float32 [count] of each, if it is known. On the meta device: the same tensors, no values."""
    if sources[0].is_meta:
        return run_steps(_normalized(sources, norms), steps, _no_values).to(dtype)
    from moonlight.kernels.symmetric import symmetric_product

    return run_steps(_normalized(sources, norms), steps, symmetric_product).to(dtype)


def _normalized(sources: Sequence[torch.Tensor], norms: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """X0 = M / (||M||_F + 1e-7) of all sources, float16."""
    counts = [len(source) for source in sources]
    x = sources[0].new_empty(sum(counts), *sources[0].shape[1:], dtype=torch.float16)
    if x.is_meta:
        return x
    from moonlight.kernels.muon_update import normalize_pass

    for source, norm, out in zip(sources, norms, x.split(counts), strict=True):
        if norm is None:
            norm = torch.linalg.vector_norm(source, dim=(-2, -1), dtype=torch.float32)
        normalize_pass(source.contiguous(), norm, out)
    return x


def _no_values(*operands: torch.Tensor, **factors: object) -> None:
    """A product on the meta device."""
