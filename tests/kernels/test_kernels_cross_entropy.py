"""Cross-entropy in parts of the vocabulary: kernel and torch version must equal autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moonlight.kernels import blocks, cross_entropy
from tests.support.kernels import DEVICE, DTYPES, assert_near, needs_triton, random

pytestmark = needs_triton
SUMS = (cross_entropy.partial_sums_triton, cross_entropy.partial_sums_torch, cross_entropy.partial_sums)
GRADIENTS = (cross_entropy.loss_gradient_triton_, cross_entropy.loss_gradient_torch_, cross_entropy.loss_gradient_)
IGNORED = -100


def draw_labels(rows, vocabulary, seed=0):
    """Return labels, about one in four of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    return labels.masked_fill(torch.rand(rows, generator=generator) < 0.25, IGNORED).to(DEVICE)


def check(logits, labels, ranks):
    """Check losses and gradients of the vocabulary split into `ranks` parts and combined as ranks do."""
    leaf = logits.double().requires_grad_()
    losses = F.cross_entropy(leaf, labels, reduction="none", ignore_index=IGNORED)
    weights = random(len(labels), seed=5).double()
    (gradient,) = torch.autograd.grad((losses * weights).sum(), leaf)
    scale = torch.where(labels == IGNORED, 0, weights).float()
    log_sums = logits.double().logsumexp(1)
    for sums, to_gradient in zip(SUMS, GRADIENTS, strict=True):
        parts = [part.clone() for part in logits.tensor_split(ranks, 1)]
        starts = [sum(part.shape[1] for part in parts[:rank]) for rank in range(ranks)]
        partial = [sums(part, labels, start) for part, start in zip(parts, starts, strict=True)]
        assert {x.dtype for values in partial for x in values} == {torch.float32}
        maxima, totals, label_logits = (torch.stack(values) for values in zip(*partial, strict=True))
        for part, maximum in zip(parts, maxima, strict=True):
            assert torch.equal(maximum, part.float().amax(1))
        largest = maxima.amax(0)
        log_sum_exp = largest + (totals * torch.exp(maxima - largest)).sum(0).log()
        assert_near(log_sum_exp, log_sums, sums, torch.ones_like(log_sums))
        counted = torch.where(labels == IGNORED, 0.0, log_sum_exp - label_logits.sum(0))
        assert_near(counted, losses.detach(), sums, log_sums.abs() + 1)
        assert (label_logits.sum(0)[labels == IGNORED] == 0).all()
        for part, start in zip(parts, starts, strict=True):
            before = part.data_ptr()
            result = to_gradient(part, labels, start, log_sum_exp, scale)
            assert result is part and result.data_ptr() == before and result.dtype == logits.dtype
        # Probabilities carry the rounding of exponents as large as the logits.
        size = scale.double().abs()[:, None].expand_as(gradient)
        assert_near(torch.cat(parts, 1), gradient, to_gradient, size)
    fused = logits.clone()
    counted = torch.where(labels == IGNORED, 0.0, cross_entropy.loss_and_gradient_(fused, labels, scale))
    assert_near(counted, losses.detach(), cross_entropy.loss_and_gradient_, log_sums.abs() + 1)
    assert_near(fused, gradient, cross_entropy.loss_and_gradient_, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary", "ranks"), ((3, 4096, 1), (5, 5000, 1), (4, 9001, 2), (2, 3, 3)))
def test_kernel_and_torch_version_equal_float64(rows, vocabulary, ranks, dtype):
    check(random(rows, vocabulary, dtype=dtype, scale=4), draw_labels(rows, vocabulary), ranks)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 5),
    vocabulary=st.integers(4, 70),
    ranks=st.integers(1, 3),
    columns=st.sampled_from((16, 64)),
    block_elements=st.integers(1, 100),
    scale=st.sampled_from((1, 20)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape_in_tiny_blocks(rows, vocabulary, ranks, columns, block_elements, scale, dtype, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "SUM_COLUMNS", columns)
        patch.setattr(cross_entropy, "GRADIENT_COLUMNS", columns)
        patch.setattr(blocks, "BLOCK_ELEMENTS", block_elements)
        logits = random(rows, vocabulary, dtype=dtype, scale=scale, seed=seed)
        check(logits, draw_labels(rows, vocabulary, seed), ranks)


@pytest.mark.parametrize(("sums", "to_gradient"), zip(SUMS, GRADIENTS, strict=True))
def test_padded_vocabulary_of_minus_infinity(sums, to_gradient, monkeypatch):
    """Padding columns may be -inf, even the full first block; their gradient must be 0."""
    monkeypatch.setattr(cross_entropy, "SUM_COLUMNS", 16)
    logits = torch.full((2, 37), -torch.inf, device=DEVICE)
    logits[:, 20:30] = random(2, 10)
    labels = torch.tensor([25, 29], device=DEVICE)
    maximum, total, label_logits = sums(logits, labels, 0)
    finite = logits[:, 20:30].clone()
    assert torch.equal(maximum, finite.amax(1))
    assert torch.allclose(total, (finite - maximum[:, None]).exp().sum(1))
    assert torch.equal(label_logits, finite[[0, 1], [5, 9]])
    to_gradient(logits, labels, 0, maximum + total.log(), torch.ones_like(maximum))
    assert torch.allclose(logits[:, 20:30], finite.softmax(1) - F.one_hot(labels - 20, 10), atol=1e-6)
    assert not logits[:, :20].any() and not logits[:, 30:].any()


@pytest.mark.parametrize("sums", SUMS)
def test_nan_propagates(sums):
    logits = random(2, 50)
    logits[1, 7] = torch.nan
    _, total, _ = sums(logits, torch.tensor([1, 2], device=DEVICE), 0)
    assert total[0].isfinite() and total[1].isnan()
