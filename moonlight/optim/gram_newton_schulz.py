"""Newton-Schulz of batches on a GPU, in float16: several steps on one Gram matrix, with symmetric products.

A step multiplies X [n, m] by a polynomial P of G = X X^T (of X^T X from the right, if X is tall). The next Gram matrix
is P G P. All these matrices are symmetric and commute, so half of each is computed.

k steps can therefore share one new Gram matrix and one product with X. They take 3 n^2 m + (4k - 3) n^3 operations if a
symmetric product costs half; k steps on X itself take k (3 n^2 m + n^3). Sharing is cheaper unless X is square.

On a CPU, bfloat16 is the fast dtype, in which other groups of steps are accurate (newton_schulz.py).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

Coefficients = tuple[float, float, float]
Product = Callable[..., None]


def group_steps(steps: Sequence[Coefficients], rows: int, columns: int) -> list[list[Coefficients]]:
    """Group the steps that share a Gram matrix: three if they are equal, otherwise two; one if X is square.

    A rounding error of G matters most where G is small, and the steps of a group amplify it. Float16 allows three steps
    of Moonlight's, or two of Polar Express, whose first steps are steep (three gave infinities). In bfloat16 even two
    lose more accuracy than the plain loop.
    """
    if rows == columns:
        return [[step] for step in steps]
    groups: list[list[Coefficients]] = []
    remaining = list(steps)
    while remaining:
        count = 3 if len(set(remaining[:3])) == 1 else 2
        groups.append(remaining[:count])
        remaining = remaining[count:]
    return groups


def run_steps(x: torch.Tensor, steps: Sequence[Coefficients], product: Product) -> torch.Tensor:
    """Return the result of all steps on float16 X0 [count, rows, columns].

    Keep no other reference to `x`: its memory is then reused. `product` is `kernels.symmetric.symmetric_product`, or a
    function that computes the same.
    """
    _, rows, columns = x.shape
    with _float32_sums():
        for group in group_steps(steps, rows, columns):
            polynomial = _polynomial(x.mT if rows > columns else x, group, product)
            x = torch.bmm(x, polynomial) if rows > columns else torch.bmm(polynomial, x)
            del polynomial
    return x


@contextlib.contextmanager
def _float32_sums() -> Iterator[None]:
    """Make cuBLAS sum float16 products in float32, and restore torch's setting on exit.

    By default, torch lets cuBLAS reduce parts of these sums in float16.
    """
    flags = torch.backends.cuda.matmul
    previous = (flags.allow_fp16_reduced_precision_reduction, flags.allow_fp16_reduced_precision_reduction_split_k)
    flags.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        flags.allow_fp16_reduced_precision_reduction = previous


def _polynomial(x: torch.Tensor, steps: Sequence[Coefficients], product: Product) -> torch.Tensor:
    """Return the symmetric matrices [count, n, n] by which these steps multiply X [count, n, m].

    Up to four such matrices exist at the same time, two for a single step. `moonlight plan` relies on this.
    """
    count, n, _ = x.shape
    gram = x.new_empty(count, n, n)
    product(x, x.mT, gram)
    total = None
    for index, (a, b, c) in enumerate(steps, 1):
        polynomial = torch.empty_like(gram)
        product(gram, gram, polynomial, alpha=c, added=gram, beta=b, gamma=a)
        if index < len(steps):
            half = torch.empty_like(gram)
            product(polynomial, gram, half)
            product(half, polynomial, gram)
            del half
        if total is None:
            total = polynomial
        else:
            combined = torch.empty_like(gram)
            product(polynomial, total, combined)
            total = combined
    assert total is not None, "no steps"
    return total


def orthogonalize_batch(
    sources: Sequence[torch.Tensor],
    norms: Sequence[torch.Tensor | None],
    steps: Sequence[Coefficients],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Orthogonalize matrices of one shape on a GPU.

    On the meta device, this allocates the same tensors without values.

    Args:
        sources: tensors [count, rows, columns] in any floating dtype; counts may differ.
        norms: for each source, the Frobenius norms, float32 [count], or None.

    Returns:
        All matrices of `sources`, [sum of counts, rows, columns] in `dtype`.
    """
    if sources[0].is_meta:
        return run_steps(_normalized(sources, norms), steps, _no_values).to(dtype)
    from moonlight.kernels.symmetric import symmetric_product

    return run_steps(_normalized(sources, norms), steps, symmetric_product).to(dtype)


def _normalized(sources: Sequence[torch.Tensor], norms: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Return X0 = M / (||M||_F + 1e-7) of all sources, float16 [sum of counts, rows, columns]."""
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
    """Stand in for a product on the meta device: compute nothing."""
