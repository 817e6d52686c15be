"""Rotary embedding: the torch version must equal Megatron bit for bit; kernel and torch version must equal float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonlight.kernels import blocks, rope
from tests.support.kernels import DEVICE, DTYPES, assert_near, needs_triton, random

pytestmark = needs_triton
ROTATES = (rope.rotate_triton, rope.rotate_torch, rope.rotate)
BACKWARDS = (rope.rotate_backward_triton, rope.rotate_backward_torch, rope.rotate_backward)


def draw_angles(length, batch, dim, seed=0):
    """Return angles [length, batch, 1, dim], each twice, like RotaryEmbedding."""
    half = random(length, batch, 1, dim // 2, seed=seed, scale=20)
    return torch.cat((half, half), -1)


def exact(x, angles):
    """Rotate pair by pair in float64, by definition."""
    first, second = x.double()[..., 0::2], x.double()[..., 1::2]
    cosine, sine = (f(angles).double()[..., : x.shape[-1] // 2] for f in (torch.cos, torch.sin))
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


def check(x, grad, angles):
    cosine, sine = angles.cos(), angles.sin()
    leaf = x.double().requires_grad_()
    expected = exact(leaf, angles)
    (gradient,) = torch.autograd.grad(expected, leaf, grad.double())
    largest = max(x.abs().max().double(), grad.abs().max().double())
    for rotate in ROTATES:
        result = rotate(x, cosine, sine)
        assert result.dtype == x.dtype
        assert_near(result, expected.detach(), rotate, largest)
    for backward in BACKWARDS:
        result = backward(grad, cosine, sine)
        assert result.dtype == x.dtype
        assert_near(result, gradient, backward, largest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim"), ((1, 64), (16, 64), (3, 6), (40, 8), (1, 2)))
def test_kernel_and_torch_version_equal_float64(heads, dim, dtype):
    for batches in (1, 2):
        x, grad = (random(5, 2, heads, dim, dtype=dtype, seed=i) for i in range(2))
        check(x, grad, draw_angles(5, batches, dim))


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 9),
    batch=st.integers(1, 3),
    heads=st.integers(1, 9),
    half=st.integers(1, 9),
    before=st.integers(0, 3),
    tile_heads=st.sampled_from((1, 4, 32)),
    block_elements=st.integers(1, 300),
    angles_per_batch=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_parts_of_wider_heads_in_tiny_tiles(
    length, batch, heads, half, before, tile_heads, block_elements, angles_per_batch, dtype, seed
):
    x, grad = (random(length, batch, heads, before + 2 * half, dtype=dtype, seed=seed + i) for i in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rope, "TILE_HEADS", max(tile_heads, 1))
        patch.setattr(blocks, "BLOCK_ELEMENTS", block_elements)
        angles = draw_angles(length, batch if angles_per_batch else 1, 2 * half, seed)
        check(x[..., before:], grad[..., before:], angles)


def test_the_torch_version_is_bit_identical_to_megatron():
    import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    for batches, heads, dim in ((1, 16, 64), (2, 1, 64), (2, 4, 16)):
        angles = draw_angles(33, batches, dim).cpu()  # on a GPU the two versions fuse products and sums differently
        x = random(33, 2, heads, 32 + dim, device="cpu")[..., 32:].requires_grad_()
        expected = _apply_rotary_pos_emb_bshd(x, angles, rotary_interleaved=False, multi_latent_attention=True)
        grad = random(*x.shape, seed=1, device="cpu")
        (gradient,) = torch.autograd.grad(expected, x, grad)
        assert torch.equal(rope.rotate_torch(x.detach(), angles.cos(), angles.sin()), expected)
        assert torch.equal(rope.rotate_backward_torch(grad, angles.cos(), angles.sin()), gradient)


@pytest.mark.parametrize("rotate", ROTATES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_result_as_part_of_wider_heads(rotate, dtype):
    x, angles = random(4, 2, 3, 8, dtype=dtype), draw_angles(4, 1, 8)
    query = torch.zeros(4, 2, 3, 13, dtype=dtype, device=DEVICE)
    rotate(x, angles.cos(), angles.sin(), out=query[..., 5:])
    assert torch.equal(query[..., 5:], rotate(x, angles.cos(), angles.sin()))
    assert not query[..., :5].any()


@pytest.mark.parametrize(("rotate", "backward"), zip(ROTATES, BACKWARDS, strict=True))
def test_backward_inverts_the_rotation(rotate, backward):
    x, angles = random(6, 2, 4, 64), draw_angles(6, 2, 64)
    rotated = rotate(x, angles.cos(), angles.sin())
    assert torch.allclose(backward(rotated, angles.cos(), angles.sin()), x, atol=1e-5)
