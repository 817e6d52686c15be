"""SwiGLU: kernel and torch version must equal autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moonlight.kernels import blocks, swiglu
from tests.support.kernels import DEVICE, DTYPES, assert_near, needs_triton, random

pytestmark = needs_triton
FORWARDS = (swiglu.swiglu_triton, swiglu.swiglu_torch, swiglu.swiglu)
BACKWARDS = (swiglu.swiglu_backward_triton, swiglu.swiglu_backward_torch, swiglu.swiglu_backward)


def inputs(tokens, width, dtype, seed=0):
    """Return grad_inner, gate and up (the halves of one tensor), and probabilities."""
    both = random(tokens, 2 * width, dtype=dtype, seed=seed, scale=3)
    return random(tokens, width, dtype=dtype, seed=seed + 1), *both.chunk(2, 1), random(tokens, seed=seed + 2).sigmoid()


def exact(grad, gate, up, probabilities):
    """Return inner, grad_gate, grad_up and grad_probabilities by autograd."""
    leaves = [x.double().requires_grad_() for x in (gate, up, probabilities) if x is not None]
    inner = F.silu(leaves[0]) * leaves[1]
    if probabilities is not None:
        inner = inner * leaves[2][:, None]
    return inner.detach(), *torch.autograd.grad(inner, leaves, grad.double())


def check(tokens, width, dtype, with_probabilities, seed=0):
    grad, gate, up, probabilities = inputs(tokens, width, dtype, seed)
    given_probabilities = probabilities if with_probabilities else None
    inner, grad_gate, grad_up, *rest = exact(grad, gate, up, given_probabilities)
    for forward in FORWARDS:
        result = forward(gate, up, given_probabilities)
        assert result.dtype == dtype
        assert_near(result, inner, forward)
    for backward in BACKWARDS:
        to_gate, to_up, to_probabilities, recomputed = backward(grad, gate, up, given_probabilities)
        assert to_gate.dtype == to_up.dtype == recomputed.dtype == dtype
        # Near its zero at -1.28, the slope of silu is a difference of larger terms.
        assert_near(to_gate, grad_gate, backward, (grad.double() * up).abs())
        assert_near(to_up, grad_up, backward)
        assert_near(recomputed, inner, backward)
        if with_probabilities:
            assert to_probabilities.dtype == torch.float32
            assert_near(to_probabilities, rest[0], backward, (grad * F.silu(gate) * up).double().abs().sum(1))
        else:
            assert to_probabilities is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_probabilities", (True, False))
@pytest.mark.parametrize(("tokens", "width"), ((0, 8), (1, 1), (5, 96), (9, 528), (4, 1408)))
def test_kernel_and_torch_version_equal_float64(tokens, width, dtype, with_probabilities):
    check(tokens, width, dtype, with_probabilities)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 13),
    width=st.integers(1, 40),
    rows=st.sampled_from((1, 2, 8)),
    columns=st.sampled_from((8, 16)),
    block_elements=st.integers(1, 100),
    dtype=st.sampled_from(DTYPES),
    with_probabilities=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_in_tiny_blocks(tokens, width, rows, columns, block_elements, dtype, with_probabilities, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swiglu, "ROWS", rows)
        patch.setattr(swiglu, "COLUMNS", columns)
        patch.setattr(blocks, "BLOCK_ELEMENTS", block_elements)
        check(tokens, width, dtype, with_probabilities, seed)


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_may_be_halves_of_one_tensor(backward, dtype):
    values = inputs(7, 33, dtype)
    expected = backward(*values)
    out = torch.full((7, 66), torch.nan, dtype=dtype, device=DEVICE)
    result = backward(*values, out=out.chunk(2, 1))
    assert result[0].data_ptr() == out.data_ptr()
    for one, other in zip(result, expected, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(out, torch.cat(expected[:2], 1))


@pytest.mark.parametrize("backward", BACKWARDS)
def test_extreme_gates_stay_finite(backward):
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], device=DEVICE)
    up, probabilities = torch.ones_like(gate), torch.ones(1, device=DEVICE)
    to_gate, to_up, _, inner = backward(torch.ones_like(gate), gate, up, probabilities)
    assert torch.equal(to_gate, gate.new_tensor([[0.0, 0.0, 0.5, 1.0, 1.0]]))
    assert torch.allclose(inner, gate.new_tensor([[0.0, 0.0, 0.0, 100.0, 1e4]]), atol=1e-40)
    assert torch.equal(to_up, inner)


@pytest.mark.parametrize("backward", BACKWARDS)
def test_expanded_gradient(backward):
    """Gradients may be expanded tensors, whose strides are 0, as autograd passes them."""
    _, *values = inputs(3, 10, torch.float32)
    expanded = torch.ones(1, 1, device=DEVICE).expand(3, 10)
    for one, other in zip(backward(expanded, *values), backward(expanded.contiguous(), *values), strict=True):
        # The two are compiled separately, so their sums may have different orders.
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
