"""Sorting, permuting and unpermuting tokens: kernels and torch versions must equal slow loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonlight.kernels import permute
from tests.support.kernels import DEVICE, DTYPES, assert_near, needs_triton, random

pytestmark = needs_triton
SORTS = (permute.sort_by_expert_triton, permute.sort_by_expert_torch, permute.sort_by_expert)
GATHERS = (permute.permute_tokens_triton, permute.permute_tokens_torch, permute.permute_tokens)
COMBINES = (permute.unpermute_tokens_triton, permute.unpermute_tokens_torch, permute.unpermute_tokens)


def choose(tokens, k, num_experts, seed=0):
    """Return k different experts of each token."""
    scores = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    return scores.argsort(1)[:, :k].contiguous().to(DEVICE)


def check_sort(sort, chosen, num_experts):
    source, inverse, ends = sort(chosen, num_experts)
    copies = sorted((expert, copy) for copy, expert in enumerate(chosen.flatten().tolist()))
    assert source.tolist() == [copy // chosen.shape[1] for _, copy in copies]
    assert inverse.shape == chosen.shape
    positions = inverse.flatten().tolist()
    assert [positions[copy] for _, copy in copies] == list(range(len(copies)))
    assert ends.tolist() == [sum(expert <= e for expert, _ in copies) for e in range(num_experts)]
    assert (source.dtype, inverse.dtype, ends.dtype) == (torch.int64, torch.int64, torch.int32)
    assert ends.is_contiguous()


@pytest.mark.parametrize("sort", SORTS)
@pytest.mark.parametrize(("tokens", "k", "num_experts"), ((0, 2, 4), (1, 1, 1), (300, 6, 64), (40, 8, 384), (9, 3, 3)))
def test_sorted_by_expert_and_stable(sort, tokens, k, num_experts):
    check_sort(sort, choose(tokens, k, num_experts), num_experts)


@pytest.mark.parametrize("sort", SORTS)
@pytest.mark.parametrize("expert", (0, 3, 7))
def test_all_tokens_to_one_expert(sort, expert):
    check_sort(sort, torch.full((50, 1), expert, device=DEVICE), 8)


@pytest.mark.parametrize("sort", SORTS)
def test_choices_in_a_wider_tensor(sort):
    """Rows that are not contiguous must sort right."""
    check_sort(sort, choose(20, 5, 9)[:, :3], 9)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 60),
    num_experts=st.integers(1, 20),
    k=st.integers(1, 4),
    elements=st.sampled_from((16, 128, 8192)),
    seed=st.integers(0, 2**31),
)
def test_any_choice_in_blocks_of_any_size(tokens, num_experts, k, elements, seed):
    # Experts may repeat here, and most may be empty: the sort must handle both.
    chosen = torch.randint(num_experts, (tokens, k), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permute, "SORT_ELEMENTS", elements)
        for sort in SORTS:
            check_sort(sort, chosen, num_experts)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 20),
    k=st.integers(1, 4),
    hidden=st.integers(1, 40),
    rows=st.sampled_from((1, 4)),
    columns=st.sampled_from((8, 32)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_rows_of_any_shape_in_tiny_blocks(tokens, k, hidden, rows, columns, dtype, seed):
    source, inverse, _ = permute.sort_by_expert(choose(tokens, k, 6, seed), 6)
    # Rows of a wider tensor.
    x = random(tokens, hidden + 3, seed=seed, dtype=dtype)[:, :hidden]
    y = random(tokens * k, hidden + 3, seed=seed + 1, dtype=dtype)[:, :hidden]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permute, "ROWS", rows)
        patch.setattr(permute, "COLUMNS", columns)
        for gather in GATHERS:
            assert torch.equal(gather(x, source), x[source])
        for combine in COMBINES:
            result = combine(y, inverse)
            terms = y.double()[inverse]
            assert result.dtype == dtype
            assert_near(result, terms.sum(1), combine, terms.abs().sum(1))


@pytest.mark.parametrize(("gather", "combine"), zip(GATHERS, COMBINES, strict=True))
@pytest.mark.parametrize(("tokens", "k", "hidden"), ((30, 6, 8), (5, 2, 1030), (1, 1, 512)))
def test_gather_and_combine_are_adjoint(gather, combine, tokens, k, hidden):
    """<gather(x), y> must equal <x, combine(y)>; the values are small integers, so that every sum is exact."""
    source, inverse, _ = permute.sort_by_expert(choose(tokens, k, 8), 8)
    x, y = random(tokens, hidden, scale=4).round(), random(tokens * k, hidden, seed=1, scale=4).round()
    assert (gather(x, source) * y).sum(dtype=torch.float64) == (x * combine(y, inverse)).sum(dtype=torch.float64)


@pytest.mark.parametrize("combine", COMBINES)
def test_the_sum_is_rounded_once(combine):
    """1 + 4 x 2^-9 is 1 if every sum is rounded to bfloat16, and 1 + 2^-7 if only the last is."""
    y = torch.tensor([[1.0]] + [[2.0**-9]] * 4, dtype=torch.bfloat16, device=DEVICE)
    assert combine(y, torch.arange(5, device=DEVICE)[None]).item() == 1 + 2**-7
