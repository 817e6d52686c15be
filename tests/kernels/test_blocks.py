"""Operations in blocks must equal the same operations on the full tensor."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moonlight.kernels import blocks
from moonlight.optim.distributed_muon import _parts_for

SHAPES = st.lists(st.integers(1, 9), min_size=0, max_size=3)


@given(SHAPES, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 40), st.integers(0, 2**31))
def test_adding_in_blocks_is_bit_identical(shape, dtype, block_elements, seed):
    generator = torch.Generator().manual_seed(seed)
    total = torch.randn(shape, generator=generator)
    values = torch.randn(shape, generator=generator).to(dtype)
    expected = total + values.float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_ELEMENTS", block_elements)
        blocks.add_(total, values)
    assert torch.equal(total, expected)


def test_adding_accepts_transposed_tensors():
    total, values = torch.randn(5, 7), torch.randn(7, 5).bfloat16().T
    expected = total + values.float()
    blocks.add_(total, values)
    assert torch.equal(total, expected)


@given(SHAPES, st.integers(1, 40), st.integers(0, 2**31))
def test_norms_of_parts_equal_the_full_norm(shape, block_elements, seed):
    """Norms must agree to 1e-12: both are float64 sums, in different orders."""
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_ELEMENTS", block_elements)
        parts = _parts_for(value, torch.float64)
    assert sum(part.numel() for part in parts) == value.numel()
    norms = torch._foreach_norm(list(parts), dtype=torch.float64)
    assert torch.stack(norms).square().sum().sqrt().item() == pytest.approx(value.double().norm().item(), rel=1e-12)
