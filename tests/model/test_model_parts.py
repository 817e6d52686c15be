"""Attention on a CPU, sorted experts, and the head with its loss: against plain formulas in float64, gradients too."""

import math
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from moonlight.kernels.permute import pad_expert_segments, sort_by_expert
from moonlight.model import cpu_attention, latent_attention, loss, sdpa
from moonlight.model.cpu_attention import CpuAttention
from moonlight.model.experts import SortedExperts
from tests.support.kernels import random as draw
from tests.support.layouts import LAYOUTS, build, recipe

random = partial(draw, device="cpu")  # what is compared here is what a CPU takes
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""Largest error over the largest value. bfloat16: results, and what the products between them take, are rounded."""


def gradients(function, inputs, grad):
    """The result and the gradients of the inputs, in float64."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(grad.to(out.dtype))
    return [out.detach().double()] + [leaf.grad.double() for leaf in leaves]


def check(found, expected, dtype, times=1.0):
    for own, exact in zip(found, expected, strict=True):
        assert own.shape == exact.shape
        size = exact.abs().max().clamp(min=1)  # the gradient through a softmax of one logit is exactly 0
        assert (own - exact).abs().max() <= times * TOLERANCE[dtype] * size


def plain_attention(query, key, value, scale, documents):
    logits = torch.einsum("sbnd,tbnd->bnst", query, key) * scale
    length = len(query)
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    if documents is not None:
        visible = visible & (documents[:, None, :, None] == documents[:, None, None, :])
    return torch.einsum("bnst,tbnd->sbnd", logits.masked_fill(~visible, -math.inf).softmax(-1), value)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("apart", (False, True))
@pytest.mark.parametrize(
    ("length", "batch", "heads", "tile_rows", "tile_elements"),
    ((1, 1, 1, 128, 2**18), (37, 2, 3, 16, 2**10), (64, 3, 4, 16, 1), (300, 2, 2, 128, 2**18)),
)
def test_attention_in_tiles(monkeypatch, dtype, apart, length, batch, heads, tile_rows, tile_elements):
    """Tiles of some heads, of one, and of the whole; the last rows of a sequence do not fill one."""
    monkeypatch.setattr(cpu_attention, "TILE_ROWS", tile_rows)
    monkeypatch.setattr(cpu_attention, "TILE_ELEMENTS", tile_elements)
    documents = torch.arange(length).div(7, rounding_mode="floor").repeat(batch, 1) if apart else None
    if apart:
        documents[0] = 0
    inputs = [random(length, batch, heads, dim, seed=dim, dtype=dtype) for dim in (24, 25, 16)]
    inputs[1] = inputs[1][..., :24]  # as a part of wider heads
    grad = random(length, batch, heads, 16, seed=9, dtype=dtype)
    scale = 24**-0.5
    found = gradients(lambda q, k, v: CpuAttention.apply(q, k, v, scale, documents), inputs, grad)
    exact = [x.double() for x in inputs]
    expected = gradients(lambda q, k, v: plain_attention(q, k, v, scale, documents), exact, grad)
    check(found, expected, dtype, times=2.0)


def test_attention_leaves_its_inputs_alone():
    inputs = [random(8, 1, 1, 4, seed=seed) for seed in range(3)]
    before = [x.clone() for x in inputs]
    gradients(lambda q, k, v: CpuAttention.apply(q, k, v, 3.0, None), inputs, random(8, 1, 1, 4))
    CpuAttention.apply(*inputs, 3.0, None)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def attention_inputs(length, batch, heads, widths):
    """Queries, keys, and keys without rope beside values, as latent attention has them."""
    return [
        random(length, batch, heads, width, seed=seed) for seed, width in enumerate((*widths[:1] * 2, 8 + widths[1]))
    ]


@pytest.mark.parametrize(
    ("widths", "apart"), (((16, 16), False), ((16, 16), True), ((24, 16), False), ((24, 16), True))
)
def test_the_attention_of_a_gpu_is_that_of_a_cpu(widths, apart):
    """What is around torch's kernels, with those that it has for a CPU: permutations and the mask of documents."""
    inputs = attention_inputs(37, 2, 3, widths)
    documents = torch.arange(37).div(7, rounding_mode="floor").repeat(2, 1) if apart else None
    if apart:
        documents[0] = 0
    grad = random(37, 2, 3 * widths[1], seed=9)
    found = gradients(lambda q, k, kv: sdpa.attention(q, k, kv[..., 8:], 0.3, documents), inputs, grad)
    ours = gradients(lambda q, k, kv: CpuAttention.apply(q, k, kv[..., 8:], 0.3, documents).flatten(2), inputs, grad)
    for one, other in zip(found, ours, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # float32 sums of at most 37 terms, twice


@pytest.mark.parametrize(("widths", "has_mask", "name"), (((16, 16), False, "FLASH"), ((24, 16), True, "MATH")))
def test_the_kernel_that_takes_the_shapes_is_found_by_asking(monkeypatch, widths, has_mask, name):
    """As on a GPU, with those kernels that torch has for a CPU: flash attention wants keys and values of one width."""
    sdpa.select_backend.cache_clear()
    sdpa.pop_selections()
    asked = []
    seconds = sdpa._seconds
    monkeypatch.setattr(sdpa, "_seconds", lambda *given: asked.append(given[1]) or seconds(*given))
    query, key, wide = attention_inputs(20, 2, 3, widths)
    inputs = query, key, wide[..., 8:]
    before = torch.get_rng_state()
    kernel = sdpa.select_backend(torch.device("cpu"), torch.float32, tuple(map(sdpa.memory_layout, inputs)), has_mask)
    assert torch.equal(torch.get_rng_state(), before)
    assert kernel.name.startswith(name)
    assert asked and all(
        [sdpa.memory_layout(x) for x in own] == [sdpa.memory_layout(x) for x in inputs] for own in asked
    )
    assert all(x.is_leaf and x.requires_grad for own in asked for x in own)
    (text,) = sdpa.pop_selections()
    assert name.lower() in text and f"keys of {widths[0]} and values of {widths[1]}, 2 x 3 heads x 20 tokens" in text
    assert sdpa.pop_selections() == []


def plain_experts(tokens, probabilities, down_proj, gate_proj, up_proj, chosen):
    out = torch.zeros_like(tokens)
    for token in range(len(tokens)):
        for place, expert in enumerate(chosen[token].tolist()):
            inner = F.silu(tokens[token] @ gate_proj[expert]) * (tokens[token] @ up_proj[expert])
            out[token] += probabilities[token, place] * (inner @ down_proj[expert])
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("alignment", (1, 8, 32))
@pytest.mark.parametrize("which", ("all", "few", "none"))
def test_sorted_experts(dtype, alignment, which):
    """Whatever the alignment of runs; with experts that get nothing, and without tokens."""
    tokens, k, experts, hidden, width = (0 if which == "none" else 20), 2, 5, 8, 16
    alignment = alignment if tokens else 1
    chosen = torch.rand(tokens, 2 if which == "few" else experts, generator=torch.Generator().manual_seed(1))
    chosen = chosen.argsort(1)[:, :k]
    probabilities = torch.rand(tokens, k, generator=torch.Generator().manual_seed(2))
    weights = [random(experts, *shape, dtype=dtype) for shape in ((width, hidden), (hidden, width), (hidden, width))]
    inputs = [random(tokens, hidden, seed=3, dtype=dtype), probabilities, *weights]
    order = pad_expert_segments(sort_by_expert(chosen, experts), chosen, alignment)
    assert (order[2] % alignment == 0).all()
    grad = random(tokens, hidden, seed=4, dtype=dtype)
    found = gradients(lambda *x: SortedExperts.apply(*x, *order), inputs, grad)
    if tokens:
        expected = gradients(lambda *x: plain_experts(*x, chosen), [x.double() for x in inputs], grad)
        check(found, expected, dtype, times=3.0)
    else:
        assert all(not own.any() for own in found)


class Alone:
    """What LinearCrossEntropy asks of a group of one process."""

    def size(self):
        return 1

    def rank(self):
        return 0


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "chunk"), ((1, 1024), (50, 1024), (50, 16)))
def test_head_and_loss(monkeypatch, dtype, tokens, chunk):
    monkeypatch.setattr(loss, "logits_chunk_rows", lambda vocabulary: chunk)
    labels = torch.randint(0, 33, (tokens,), generator=torch.Generator().manual_seed(0))
    scale = torch.rand(tokens, generator=torch.Generator().manual_seed(1))
    scale[0] = 0.5
    inputs = [random(tokens, 16, dtype=dtype), random(33, 16, seed=1, dtype=dtype)]

    def plain(hidden, weight):
        return (F.cross_entropy(hidden @ weight.T, labels, reduction="none") * scale.to(hidden.dtype)).sum()

    found = gradients(
        lambda hidden, weight: loss.LinearCrossEntropy.apply(hidden, weight, labels, scale, Alone(), True),
        inputs,
        torch.tensor(2.0),
    )
    check(found, gradients(plain, [x.double() for x in inputs], torch.tensor(2.0)), dtype, times=2.0)


def loss_and_logits(run, tokens, labels):
    """The model's loss, and that of its logits, which tensor-parallel ranks have a part of each."""
    (model,), _ = build(run)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    mask = torch.ones_like(labels, dtype=torch.float32)
    no_gradients = mock.patch.multiple(loss, loss_and_gradient_=None, loss_gradient_=None)  # nobody asks for any
    with torch.no_grad(), no_gradients:
        together = model(tokens, positions, None, labels=labels, loss_mask=mask)
        return together.item(), model(tokens, positions, None).numpy()


@pytest.mark.parametrize("layout", ("1", "TP2"))
def test_loss_of_the_model_is_that_of_its_logits(pool, layout):
    run = recipe(LAYOUTS[layout][1])
    tokens, labels = torch.randint(0, run.model.vocab_size, (2, 3, 32), generator=torch.Generator().manual_seed(0))
    answers = pool.run(LAYOUTS[layout][0], loss_and_logits, run, tokens, labels)
    logits = torch.cat([torch.from_numpy(part) for _, part in answers], dim=-1).double()
    assert logits.shape == (*tokens.shape, run.model.vocab_size)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
    for found, _ in answers:
        assert found == pytest.approx(expected, rel=1e-6)


def pass_of_shapes_only(run):
    """A pass forward and backward of tensors without values, which raise an error when the host asks for one."""
    (model,), optimizer = build(run)
    shape = run.train.micro_batch_size, run.data.sequence_length
    latent_attention._angles.cache_clear()  # of tensors with values; and afterwards of those without
    with FakeTensorMode(allow_non_fake_inputs=True), optimizer.data_parallel.no_sync():
        tokens = torch.randint(0, run.model.vocab_size, shape)
        with pytest.raises(DataDependentOutputException):
            tokens.sum().item()
        loss = model(tokens, tokens, None, labels=tokens, loss_mask=torch.ones(shape))
        loss.backward()
    latent_attention._angles.cache_clear()
    return tuple(loss.shape)


def test_the_host_asks_for_no_value(pool):
    assert pool.run(1, pass_of_shapes_only, recipe(dtype="bfloat16")) == [()]
