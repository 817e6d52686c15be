"""The symmetric product and Newton-Schulz on Gram matrices against torch and the plain bfloat16 loop.

Without a GPU the kernels run in Triton's interpreter in tiles of 16: this tests their results, not their schedule.
"""

from __future__ import annotations  # a kernel names `tl.constexpr`, which does not exist without Triton

from itertools import chain, islice, repeat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonlight.bench.optimizer import SPECTRA, plain_loop
from moonlight.bench.peers import random_matrix
from moonlight.kernels.jit import jit, tl
from moonlight.kernels.symmetric import Tiling, _upper_tile, symmetric_product
from moonlight.optim import gram_newton_schulz
from moonlight.optim.newton_schulz import COEFFICIENTS, orthogonalize, orthogonalize_all
from tests.support.kernels import DEVICE, needs_triton, random, torch_symmetric_product
from tests.support.suites import slow

pytestmark = [needs_triton, pytest.mark.usefixtures("one_thread")]
TILING = Tiling(side=16, depth=16, group=2)
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-24}
"""Half a unit in the last place; a full unit in bfloat16, which the interpreter truncates instead of rounding."""


def symmetric(*shape: int, seed: int = 0) -> torch.Tensor:
    x = random(*shape, seed=seed)
    return x + x.mT


def check_product(left, right, *, tiling=TILING, added=None, alpha=1.0, beta=0.0, gamma=0.0, in_place=False):
    """Check that the product is exactly symmetric, and equals float64 within float32 sums and one rounding."""
    count, n, k = left.shape
    exact = alpha * (left.double() @ right.double()) + gamma * torch.eye(n, dtype=torch.float64, device=DEVICE)
    sizes = abs(alpha) * (left.double().abs() @ right.double().abs()) + abs(gamma)
    if added is not None:
        exact += beta * added.double()
        sizes += abs(beta) * added.double().abs()
    surroundings = torch.full((count, n + 2, n + 3), 7.0, dtype=left.dtype, device=DEVICE)
    out = surroundings[:, 1:-1, 1:-2]
    if in_place:
        out.copy_(added)
        added = out
    else:
        out.fill_(torch.nan)
    symmetric_product(left, right, out, alpha=alpha, added=added, beta=beta, gamma=gamma, tiling=tiling)
    assert out.equal(out.mT)
    # k + 3 operations, each with an error of at most 2^-24 of the sum of sizes, and the rounding of the result.
    bound = (k + 4) * 2.0**-24 * sizes + EPSILON[left.dtype] * exact.abs()
    assert ((out.double() - exact).abs() <= 1.01 * bound + 1e-7).all()
    surroundings[:, 1:-1, 1:-2] = 7.0
    assert surroundings.eq(7).all(), "the kernel wrote outside its output"


@pytest.mark.parametrize("dtype", list(EPSILON))
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 33, 70), (2, 5, 7), (1, 96, 32), (1, 1, 1), (1, 64, 15)])
@pytest.mark.parametrize("transposed", [False, True])
def test_gram_matrices(shape, transposed, dtype):
    count, n, k = shape
    x = (random(count, k, n).mT if transposed else random(count, n, k)).to(dtype)
    check_product(x, x.mT)


@pytest.mark.parametrize("dtype", list(EPSILON))
@pytest.mark.parametrize("in_place", [False, True])
def test_alpha_beta_and_gamma(dtype, in_place):
    x, added = random(3, 40, 24).to(dtype), symmetric(3, 40, 40, seed=1).to(dtype)
    check_product(x, x.mT, added=added, alpha=2.0315, beta=-4.775, gamma=3.4445, in_place=in_place)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 3),
    n=st.integers(1, 70),
    k=st.integers(1, 40),
    side=st.sampled_from([16, 32]),
    group=st.integers(1, 4),
    transposed=st.booleans(),
    gamma=st.sampled_from([0.0, -1.5]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(count, n, k, side, group, transposed, gamma, seed):
    x = (random(count, k, n, seed=seed).mT if transposed else random(count, n, k, seed=seed)).half()
    check_product(x, x.mT, tiling=Tiling(side, 16, group), alpha=0.5, gamma=gamma)


def test_matrices_that_commute_up_to_rounding_give_a_symmetric_product():
    x = random(2, 40, 90).half() / 10
    base = torch.empty(2, 40, 40, dtype=torch.float16, device=DEVICE)
    symmetric_product(x, x.mT, base, tiling=TILING)
    square = torch.empty_like(base)
    symmetric_product(base, base, square, tiling=TILING)
    out, reference = torch.empty_like(base), torch.empty_like(base)
    symmetric_product(square, base, out, tiling=TILING)
    torch_symmetric_product(square, base, reference)
    full = square.float() @ base.float()
    assert not full.half().equal(full.half().mT), "the plain product is already symmetric: the test checks nothing"
    assert out.equal(out.mT)
    # Float32 sums in another order may round to the next float16.
    torch.testing.assert_close(out, reference, rtol=2**-10, atol=1e-6)


@jit
def _tiles_kernel(rows, columns, tiles, GROUP: tl.constexpr):
    row, column = _upper_tile(tl.program_id(0), tiles, GROUP)
    tl.store(rows + tl.program_id(0), row)
    tl.store(columns + tl.program_id(0), column)


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("tiles", [1, 2, 7, 8, 11, slow(29)])
def test_every_tile_of_the_triangle_has_one_index(tiles, group):
    count = tiles * (tiles + 1) // 2
    rows, columns = torch.full((2, count), -1, dtype=torch.int32, device=DEVICE)
    _tiles_kernel[(count,)](rows, columns, tiles, GROUP=group)
    indices = list(zip(rows.tolist(), columns.tolist(), strict=True))
    assert sorted(indices) == [(row, column) for row in range(tiles) for column in range(row, tiles)]
    in_groups = [column // group for _, column in indices]
    assert in_groups == sorted(in_groups)


def test_wrong_operands_are_named():
    x, out = random(2, 8, 6).half(), random(2, 8, 8).half()
    with pytest.raises(ValueError, match=r"right has shape \[2, 8, 6\]: with left \[2, 8, 6\] it must be \[2, 6, 8\]"):
        symmetric_product(x, x, out)
    with pytest.raises(ValueError, match=r"out has shape \[1, 8, 8\]"):
        symmetric_product(x, x.mT, out[:1])
    with pytest.raises(ValueError, match=r"dtypes are torch\.float16 and torch\.float32"):
        symmetric_product(x, x.mT.float(), out)


def coefficients_of(name: str, num_steps: int) -> list[gram_newton_schulz.Coefficients]:
    first, then = COEFFICIENTS[name]
    return list(islice(chain(first, repeat(then)), num_steps))


def test_steps_that_share_a_gram_matrix():
    def lengths(name, num_steps, rows=20, columns=30):
        segments = gram_newton_schulz.group_steps(coefficients_of(name, num_steps), rows, columns)
        assert list(chain.from_iterable(segments)) == coefficients_of(name, num_steps)
        return [len(segment) for segment in segments]

    assert lengths("moonlight", 5) == [3, 2] and lengths("moonlight", 1) == [1]
    assert lengths("polar_express", 5) == [2, 2, 1] and lengths("polar_express", 12) == [2, 2, 2, 2, 3, 1]
    assert lengths("deepseekv4", 10) == [3, 3, 2, 2]
    assert lengths("moonlight", 4, 30, 30) == [1, 1, 1, 1]


def gram_newton_schulz_in_torch(matrix: torch.Tensor, name: str, num_steps: int) -> torch.Tensor:
    """Run Newton-Schulz on Gram matrices on one matrix with torch products; return it rounded to bfloat16."""
    x = (matrix / matrix.norm()).half().unsqueeze(0)
    return (
        gram_newton_schulz.run_steps(x, coefficients_of(name, num_steps), torch_symmetric_product)[0].bfloat16().float()
    )


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(352, 512), slow((256, 1024)), (1024, 64), slow((400, 400))])
@pytest.mark.parametrize("name", sorted(COEFFICIENTS))
def test_float16_on_gram_matrices_is_more_exact_than_the_plain_loop(name, shape, spectrum):
    num_steps = 10 if name == "deepseekv4" else 5
    matrix = random_matrix(spectrum, *shape)
    exact = plain_loop(matrix, torch.float32, num_steps, name)
    plain = (plain_loop(matrix, torch.bfloat16, num_steps, name).float() - exact).norm()
    result = (gram_newton_schulz_in_torch(matrix, name, num_steps) - exact).norm()
    assert result <= 0.7 * plain  # 0.1 to 0.55 of it in all cases


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("num_steps", [slow(6), slow(7), 8])
@pytest.mark.parametrize("name", ["moonlight", "polar_express"])
def test_more_steps_are_safe_too(name, num_steps, spectrum):
    matrix = random_matrix(spectrum, 256, 384)
    exact = plain_loop(matrix, torch.float32, num_steps, name)
    plain = (plain_loop(matrix, torch.bfloat16, num_steps, name).float() - exact).norm()
    assert (gram_newton_schulz_in_torch(matrix, name, num_steps) - exact).norm() <= 0.7 * plain


def test_three_steep_steps_on_one_gram_matrix_would_not_be_safe():
    """Without the limit of `group_steps`, the error must exceed that of the plain loop."""
    matrix = random_matrix("power law", 256, 1024)
    steps = coefficients_of("polar_express", 5)
    exact = plain_loop(matrix, torch.float32, 5, "polar_express")
    x = (matrix / matrix.norm()).half().unsqueeze(0)
    polynomial = gram_newton_schulz._polynomial(x, steps[:3], torch_symmetric_product)
    x = torch.bmm(polynomial, x)
    x = torch.bmm(gram_newton_schulz._polynomial(x, steps[3:], torch_symmetric_product), x)
    plain = (plain_loop(matrix, torch.bfloat16, 5, "polar_express").float() - exact).norm()
    assert not (x[0].float() - exact).norm() <= plain


def small_tiles(*operands, **factors):
    symmetric_product(*operands, **factors, tiling=TILING)


@pytest.mark.parametrize("shape", [(2, 40, 56), (1, 56, 40), slow((2, 33, 33))])
@pytest.mark.parametrize("name", ["moonlight", slow("polar_express")])
def test_the_kernels_equal_the_torch_version(shape, name, monkeypatch):
    """The full GPU path (normalize, iterate, round), with tensors of several owners, must equal the torch version."""
    import moonlight.kernels.symmetric as kernels

    matrices = random(*shape, seed=1)
    sources = [matrices[:1], matrices[1:]] if len(matrices) > 1 else [matrices]
    norms = [None, torch.linalg.matrix_norm(matrices[1:])] if len(matrices) > 1 else [None]
    monkeypatch.setattr(kernels, "symmetric_product", small_tiles)
    result = gram_newton_schulz.orthogonalize_batch(sources, norms, coefficients_of(name, 5), torch.bfloat16)
    assert result.dtype is torch.bfloat16 and result.shape == matrices.shape
    reference = torch.stack([gram_newton_schulz_in_torch(matrix, name, 5) for matrix in matrices])
    # Products summed in another order round to different float16 values; five steps amplify that, here to at most 0.6%.
    assert (result.float() - reference).norm() <= 2e-2 * reference.norm()
    assert (result.float() - orthogonalize(matrices, 5, name, torch.float32)).norm() <= 2e-2 * reference.norm()


def test_zero_matrices_stay_zero():
    zero = torch.zeros(1, 40, 56, device=DEVICE)
    assert (
        gram_newton_schulz.orthogonalize_batch([zero], [None], coefficients_of("moonlight", 5), torch.bfloat16)
        .eq(0)
        .all()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_meta_device_has_the_shapes_of_a_gpu(dtype):
    matrices = [torch.empty(shape, device="meta") for shape in [(3, 300, 280), (300, 280), (2, 40, 30), (256, 256)]]
    norms = [torch.empty(matrix.shape[:-2].numel(), device="meta") for matrix in matrices]
    for given_norms in (None, norms):
        results = orthogonalize_all(matrices, 5, "moonlight", dtype, given_norms)
        assert [result.shape for result in results] == [matrix.shape for matrix in matrices]
        assert all(result.is_meta and result.dtype is dtype for result in results)


def test_products_of_float16_are_summed_in_float32():
    """The cuBLAS setting must be float32 sums in all steps, and be restored afterwards."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_fp16_reduced_precision_reduction
    seen = []

    def product(*operands, **factors):
        seen.append(flags.allow_fp16_reduced_precision_reduction)
        torch_symmetric_product(*operands, **factors)

    x = random(1, 8, 12)
    gram_newton_schulz.run_steps((x / x.norm()).half(), coefficients_of("moonlight", 5), product)
    assert before and seen and not any(seen)
    assert flags.allow_fp16_reduced_precision_reduction is before
