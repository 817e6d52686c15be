"""Newton-Schulz must equal a slow reference in float64; bfloat16 is compared with the plain loop on one matrix."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonlight.bench.optimizer import SPECTRA, plain_loop
from moonlight.bench.peers import random_matrix
from moonlight.optim import newton_schulz
from moonlight.optim.newton_schulz import COEFFICIENTS, orthogonalize, orthogonalize_all
from tests.support.reference import slow_newton_schulz


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compute_in_blocks(monkeypatch: pytest.MonkeyPatch, block_rows: int) -> None:
    """Compute even tiny matrices in blocks."""
    monkeypatch.setattr(newton_schulz, "BLOCKS_FROM_SIDE", 1)
    monkeypatch.setattr(newton_schulz, "BLOCKS_FROM_ELEMENTS", 1)
    monkeypatch.setattr(newton_schulz, "BLOCK_ROWS", block_rows)


def assert_near_reference(matrices: torch.Tensor, steps: int, name: str) -> None:
    fast = orthogonalize(matrices, steps, name, torch.float32)
    for matrix, result in zip(matrices, fast, strict=True):
        slow = slow_newton_schulz(matrix.numpy(), steps, name)
        # Five steps amplify float32 rounding of the small singular values by up to 3.4^5.
        assert np.linalg.norm(result.numpy() - slow) <= 1e-4 * np.linalg.norm(slow)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    batch=st.integers(1, 3),
    name=st.sampled_from(sorted(COEFFICIENTS)),
    seed=st.integers(0, 2**31),
)
def test_float32_equals_the_slow_reference(rows, columns, batch, name, seed):
    assert_near_reference(random(batch, rows, columns, seed=seed), 5, name)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=st.integers(1, 12),
    steps=st.integers(1, 7),
    name=st.sampled_from(sorted(COEFFICIENTS)),
    seed=st.integers(0, 2**31),
)
def test_blocks_in_float32_equal_the_slow_reference(rows, columns, block, steps, name, seed):
    with pytest.MonkeyPatch.context() as patch:
        compute_in_blocks(patch, block)
        assert_near_reference(random(2, rows, columns, seed=seed), steps, name)


@pytest.mark.parametrize("shape", [(1, 600, 700), (1, 1600, 256)])
def test_large_float32_equals_the_slow_reference(shape):
    assert newton_schulz._in_blocks(torch.empty(shape))
    assert_near_reference(random(*shape), 5, "moonlight")


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(704, 640), (256, 1600), (600, 700)])
@pytest.mark.parametrize("name", sorted(COEFFICIENTS))
def test_bfloat16_blocks_are_no_worse_than_the_plain_loop(shape, kind, name):
    matrix = random_matrix(kind, *shape)
    assert newton_schulz._in_blocks(matrix)
    exact = plain_loop(matrix, torch.float32, 5, name)
    ours = (orthogonalize(matrix, 5, name, torch.bfloat16).float() - exact).norm()
    assert ours <= (plain_loop(matrix, torch.bfloat16, 5, name).float() - exact).norm()


@pytest.mark.parametrize("kind", SPECTRA)
def test_bfloat16_batches_are_no_worse_than_the_plain_loop(kind):
    for shape in ((44, 64), (96, 160), (200, 120)):
        matrix = random_matrix(kind, *shape)
        exact = plain_loop(matrix, torch.float32, 5, "moonlight")
        ours = (orthogonalize(matrix, 5, "moonlight", torch.bfloat16).float() - exact).norm()
        plain = (plain_loop(matrix, torch.bfloat16, 5, "moonlight").float() - exact).norm()
        assert ours <= 1.02 * plain  # the same arithmetic, perhaps summed in another order


def test_singular_values_end_near_one():
    values = torch.linalg.svdvals(orthogonalize(random(64, 128), 5, "moonlight", torch.float32))
    assert values.min() > 0.5 and values.max() < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 1), (640, 700)])
def test_zero_matrix_stays_zero(shape, dtype):
    result = orthogonalize(torch.zeros(shape), 5, "moonlight", dtype)
    assert result.shape == shape and result.dtype is dtype and result.eq(0).all()


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (3, 1, 9)])
def test_one_row_or_column_becomes_a_multiple_of_itself(shape):
    matrix = random(*shape)
    result = orthogonalize(matrix, 5, "moonlight", torch.float32)
    length = slow_newton_schulz(np.ones((1, 1)), 5, "moonlight").item()
    torch.testing.assert_close(result, length * matrix / torch.linalg.matrix_norm(matrix, keepdim=True))


def test_batching_by_shape_changes_only_rounding():
    shapes = [(8, 16), (3, 8, 16), (16, 8), (300, 280), (2, 300, 280), (1, 9), (8, 16), (2, 640, 660), (2, 2, 8, 16)]
    matrices = [random(*shape, seed=index) for index, shape in enumerate(shapes)]
    originals = [matrix.clone() for matrix in matrices]
    batched = orthogonalize_all(matrices, 5, "moonlight", torch.float32)
    for matrix, before, result in zip(matrices, originals, batched, strict=True):
        assert result.shape == matrix.shape and matrix.equal(before)
        alone = orthogonalize(matrix, 5, "moonlight", torch.float32)
        torch.testing.assert_close(result, alone, rtol=1e-4, atol=1e-5)


def test_transposed_views_are_accepted():
    matrix = random(3, 20, 12)
    result = orthogonalize(matrix.mT, 5, "moonlight", torch.float32)
    torch.testing.assert_close(result, orthogonalize(matrix, 5, "moonlight", torch.float32).mT)


def test_the_workspace_is_bounded(monkeypatch):
    monkeypatch.setattr(newton_schulz, "WORKSPACE_ELEMENTS", {"cpu": 5 * 6 * 8})
    sizes = []

    def recording(matrices, *arguments):
        sizes.append(matrices.numel())
        return orthogonalize(matrices, *arguments)

    monkeypatch.setattr(newton_schulz, "orthogonalize", recording)
    matrices = [random(3, 6, 8), random(11, 6, 8), random(6, 8), random(2, 6, 8), random(2, 30, 20)]
    results = orthogonalize_all(matrices, 5, "moonlight", torch.float32)
    assert max(sizes[:-2]) <= 5 * 6 * 8 and sizes[-2:] == [600, 600]
    for matrix, result in zip(matrices, results, strict=True):
        torch.testing.assert_close(result, orthogonalize(matrix, 5, "moonlight", torch.float32), rtol=1e-4, atol=1e-5)
