"""RMS norm, alone and after a sum: kernel and torch version must equal autograd in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonlight.kernels import blocks, rms_norm
from tests.support.kernels import DEVICE, DTYPES, assert_near, needs_triton, random

pytestmark = needs_triton
FORWARDS = (rms_norm.rms_norm_triton, rms_norm.rms_norm_torch, rms_norm.rms_norm)
SUMS = (rms_norm.add_rms_norm_triton, rms_norm.add_rms_norm_torch, rms_norm.add_rms_norm)
BACKWARDS = (rms_norm.rms_norm_backward_triton, rms_norm.rms_norm_backward_torch, rms_norm.rms_norm_backward)
PAIRS = ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16))
"""Dtypes of the input and of the gain."""
EPS = 1e-5


def exact(x, weight):
    """Return norm and reciprocals in float64."""
    reciprocal = (x.double().square().mean(-1) + EPS).rsqrt()
    return x.double() * reciprocal[..., None] * weight.double(), reciprocal.flatten()


def exact_gradients(grad, x, weight):
    leaves = x.double().requires_grad_(), weight.double().requires_grad_()
    return torch.autograd.grad(exact(*leaves)[0], leaves, grad.double())


def check_forward(x, weight):
    expected, reciprocals = exact(x, weight)
    for forward in FORWARDS:
        normed, reciprocal = forward(x, weight, EPS)
        assert (normed.dtype, reciprocal.dtype) == (weight.dtype, torch.float32)
        assert_near(normed, expected, forward)
        assert_near(reciprocal, reciprocals, forward)


def check_sum(residual, update, weight):
    for add in SUMS:
        total, normed, reciprocal = add(residual, update, weight, EPS)
        assert total.dtype == residual.dtype
        terms = residual.double().abs() + update.double().abs()
        assert_near(total, residual.double() + update.double(), add, terms)
        expected, reciprocals = exact(total, weight)
        assert normed.dtype == weight.dtype
        assert_near(normed, expected, add)
        assert_near(reciprocal, reciprocals, add)


def check_backward(grad, x, weight, previous_grad=None):
    to_x, to_weight = exact_gradients(grad, x, weight)
    _, reciprocal = exact(x, weight)
    # The gradient is a difference of two terms of this size.
    largest = (grad.double() * weight.double()).norm(dim=-1) * reciprocal.view(x.shape[:-1])
    size = largest[..., None].expand_as(to_x)
    if previous_grad is not None:
        to_x, size = to_x + previous_grad.double(), size + previous_grad.double().abs()
    terms = (grad.double() * x.double()).flatten(0, -2).abs() * reciprocal[:, None]
    for backward in BACKWARDS:
        gradient, gain = backward(grad, x, weight, reciprocal.float(), previous_grad)
        assert (gradient.dtype, gain.dtype) == (x.dtype, weight.dtype)
        assert_near(gradient, to_x, backward, size)
        assert_near(gain, to_weight, backward, terms.sum(0))


@pytest.mark.parametrize(("dtype", "weight_dtype"), PAIRS)
@pytest.mark.parametrize("shape", ((1, 1), (3, 2, 8), (5, 512), (2, 2048), (3, 4100)))
def test_kernel_and_torch_version_equal_float64(shape, dtype, weight_dtype):
    x, other = random(*shape, dtype=dtype), random(*shape, dtype=weight_dtype, seed=1)
    weight = (1 + random(shape[-1], seed=2)).to(weight_dtype)
    check_forward(x, weight)
    check_sum(x, other, weight)
    check_backward(other, x, weight)
    check_backward(other, x, weight, random(*shape, dtype=dtype, seed=3))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 25),
    hidden=st.integers(1, 40),
    tile=st.sampled_from((8, 64)),
    programs=st.integers(1, 4),
    block_elements=st.integers(1, 200),
    dtypes=st.sampled_from(PAIRS),
    seed=st.integers(0, 2**31),
)
def test_any_shape_in_tiny_blocks(rows, hidden, tile, programs, block_elements, dtypes, seed):
    x, previous_grad = (random(rows, hidden, dtype=dtypes[0], seed=seed + i) for i in range(2))
    other, weight = (random(*shape, dtype=dtypes[1], seed=seed) for shape in ((rows, hidden), (hidden,)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rms_norm, "TILE_ELEMENTS", tile)
        patch.setattr(rms_norm, "BACKWARD_PROGRAMS", programs)
        patch.setattr(blocks, "BLOCK_ELEMENTS", block_elements)
        check_forward(x, weight)
        check_sum(x, other, weight)
        check_backward(other, x, weight, previous_grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_wider_tensor_and_expanded_gradients(dtype):
    """Input rows may be slices of a wider tensor, as in latent attention, and gradients may have stride 0."""
    x, weight = random(4, 3, 80, dtype=dtype)[..., :64], random(64, dtype=dtype, seed=1)
    check_forward(x, weight)
    check_sum(x, x.contiguous(), weight)
    check_backward(torch.ones(1, 1, 1, dtype=dtype, device=DEVICE).expand(4, 3, 64), x, weight)


@pytest.mark.parametrize("forward", FORWARDS)
def test_rows_of_zeros_and_large_values_stay_finite(forward):
    x = torch.tensor([[0.0], [1e15]], device=DEVICE).repeat(1, 16)
    normed, reciprocal = forward(x, torch.ones(16, device=DEVICE), EPS)
    assert torch.allclose(normed, torch.tensor([[0.0], [1.0]], device=DEVICE).expand(2, 16))
    assert torch.allclose(reciprocal, torch.tensor([EPS**-0.5, 1e-15], device=DEVICE))


@pytest.mark.parametrize("backward", BACKWARDS)
def test_backward_is_deterministic(backward):
    grad, x, weight = random(700, 96), random(700, 96, seed=1), random(96, seed=2)
    reciprocal = exact(x, weight)[1].float()
    first, second = (backward(grad, x, weight, reciprocal) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
