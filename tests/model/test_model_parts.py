"""CPU attention, sorted experts, and the head with its loss must equal plain float64 formulas, gradients included."""

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

random = partial(draw, device="cpu")  # these tests compare the CPU implementations
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""Largest error relative to the largest value. In bfloat16, results and the inputs of inner products are rounded."""


def gradients(function, inputs, grad):
    """Return the result and the gradients of the inputs, in float64."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(grad.to(out.dtype))
    return [out.detach().double()] + [leaf.grad.double() for leaf in leaves]


def check(results, expected, dtype, times=1.0):
    for result, exact in zip(results, expected, strict=True):
        assert result.shape == exact.shape
        size = exact.abs().max().clamp(min=1)  # the gradient through a softmax of one logit is exactly 0
        assert (result - exact).abs().max() <= times * TOLERANCE[dtype] * size


def plain_attention(query, key, value, scale, documents):
    logits = torch.einsum("sbnd,tbnd->bnst", query, key) * scale
    length = len(query)
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    if documents is not None:
        visible = visible & (documents[:, None, :, None] == documents[:, None, None, :])
    return torch.einsum("bnst,tbnd->sbnd", logits.masked_fill(~visible, -math.inf).softmax(-1), value)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("separated", (False, True))
@pytest.mark.parametrize(
    ("length", "batch", "heads", "tile_rows", "tile_elements"),
    ((1, 1, 1, 128, 2**18), (37, 2, 3, 16, 2**10), (64, 3, 4, 16, 1), (300, 2, 2, 128, 2**18)),
)
def test_attention_in_tiles(monkeypatch, dtype, separated, length, batch, heads, tile_rows, tile_elements):
    """Tiles may have several heads, one head, or all; the last rows of a sequence may not fill a tile."""
    monkeypatch.setattr(cpu_attention, "TILE_ROWS", tile_rows)
    monkeypatch.setattr(cpu_attention, "TILE_ELEMENTS", tile_elements)
    documents = torch.arange(length).div(7, rounding_mode="floor").repeat(batch, 1) if separated else None
    if separated:
        documents[0] = 0
    inputs = [random(length, batch, heads, dim, seed=dim, dtype=dtype) for dim in (24, 25, 16)]
    inputs[1] = inputs[1][..., :24]  # a slice of wider heads
    grad = random(length, batch, heads, 16, seed=9, dtype=dtype)
    scale = 24**-0.5
    results = gradients(lambda q, k, v: CpuAttention.apply(q, k, v, scale, documents), inputs, grad)
    exact = [x.double() for x in inputs]
    expected = gradients(lambda q, k, v: plain_attention(q, k, v, scale, documents), exact, grad)
    check(results, expected, dtype, times=2.0)


def test_attention_does_not_change_its_inputs():
    inputs = [random(8, 1, 1, 4, seed=seed) for seed in range(3)]
    before = [x.clone() for x in inputs]
    gradients(lambda q, k, v: CpuAttention.apply(q, k, v, 3.0, None), inputs, random(8, 1, 1, 4))
    CpuAttention.apply(*inputs, 3.0, None)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def attention_inputs(length, batch, heads, widths):
    """Return queries, keys, and a tensor of keys without rope and values, as in latent attention."""
    return [
        random(length, batch, heads, width, seed=seed) for seed, width in enumerate((*widths[:1] * 2, 8 + widths[1]))
    ]


@pytest.mark.parametrize(
    ("widths", "separated"), (((16, 16), False), ((16, 16), True), ((24, 16), False), ((24, 16), True))
)
def test_gpu_attention_equals_cpu_attention(widths, separated):
    """The permutations and document mask of the GPU path must be right; torch's CPU kernels run inside."""
    inputs = attention_inputs(37, 2, 3, widths)
    documents = torch.arange(37).div(7, rounding_mode="floor").repeat(2, 1) if separated else None
    if separated:
        documents[0] = 0
    grad = random(37, 2, 3 * widths[1], seed=9)
    results = gradients(lambda q, k, kv: sdpa.attention(q, k, kv[..., 8:], 0.3, documents), inputs, grad)
    expected = gradients(
        lambda q, k, kv: CpuAttention.apply(q, k, kv[..., 8:], 0.3, documents).flatten(2), inputs, grad
    )
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5)  # float32 sums of at most 37 terms, twice


@pytest.mark.parametrize(("widths", "has_mask", "name"), (((16, 16), False, "FLASH"), ((24, 16), True, "MATH")))
def test_the_backend_is_selected_by_trying_the_shapes(monkeypatch, widths, has_mask, name):
    """Selection runs as on a GPU, with torch's CPU kernels; flash attention requires keys and values of one width."""
    sdpa.select_backend.cache_clear()
    sdpa.pop_selections()
    trials = []
    seconds = sdpa._seconds
    monkeypatch.setattr(sdpa, "_seconds", lambda *args: trials.append(args[1]) or seconds(*args))
    query, key, wide = attention_inputs(20, 2, 3, widths)
    inputs = query, key, wide[..., 8:]
    before = torch.get_rng_state()
    kernel = sdpa.select_backend(torch.device("cpu"), torch.float32, tuple(map(sdpa.memory_layout, inputs)), has_mask)
    assert torch.equal(torch.get_rng_state(), before)
    assert kernel.name.startswith(name)
    assert trials and all(
        [sdpa.memory_layout(x) for x in trial] == [sdpa.memory_layout(x) for x in inputs] for trial in trials
    )
    assert all(x.is_leaf and x.requires_grad for trial in trials for x in trial)
    (text,) = sdpa.pop_selections()
    assert name.lower() in text and f"keys of {widths[0]} and values of {widths[1]}, 2 x 3 heads x 20 tokens" in text
    assert sdpa.pop_selections() == []


def plain_experts(tokens, probabilities, down_proj, gate_proj, up_proj, chosen):
    out = torch.zeros_like(tokens)
    for token in range(len(tokens)):
        for index, expert in enumerate(chosen[token].tolist()):
            inner = F.silu(tokens[token] @ gate_proj[expert]) * (tokens[token] @ up_proj[expert])
            out[token] += probabilities[token, index] * (inner @ down_proj[expert])
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("alignment", (1, 8, 32))
@pytest.mark.parametrize("which", ("all", "few", "none"))
def test_sorted_experts(dtype, alignment, which):
    """Any alignment of expert segments must work, with experts that get no tokens, and without tokens."""
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
    results = gradients(lambda *x: SortedExperts.apply(*x, *order), inputs, grad)
    if tokens:
        expected = gradients(lambda *x: plain_experts(*x, chosen), [x.double() for x in inputs], grad)
        check(results, expected, dtype, times=3.0)
    else:
        assert all(not result.any() for result in results)


class SingleProcessGroup:
    """The part of a process group of one that LinearCrossEntropy uses."""

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

    results = gradients(
        lambda hidden, weight: loss.LinearCrossEntropy.apply(hidden, weight, labels, scale, SingleProcessGroup(), True),
        inputs,
        torch.tensor(2.0),
    )
    check(results, gradients(plain, [x.double() for x in inputs], torch.tensor(2.0)), dtype, times=2.0)


def loss_and_logits(config, tokens, labels):
    """Return the model's loss, and this tensor-parallel rank's part of its logits."""
    (model,), _ = build(config)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    mask = torch.ones_like(labels, dtype=torch.float32)
    no_gradients = mock.patch.multiple(loss, loss_and_gradient_=None, loss_gradient_=None)  # must not be called
    with torch.no_grad(), no_gradients:
        loss_sum = model(tokens, positions, None, labels=labels, loss_mask=mask)
        return loss_sum.item(), model(tokens, positions, None).numpy()


@pytest.mark.parametrize("layout", ("1", "TP2"))
def test_the_loss_of_the_model_equals_that_of_its_logits(pool, layout):
    config = recipe(LAYOUTS[layout][1])
    tokens, labels = torch.randint(0, config.model.vocab_size, (2, 3, 32), generator=torch.Generator().manual_seed(0))
    answers = pool.run(LAYOUTS[layout][0], loss_and_logits, config, tokens, labels)
    logits = torch.cat([torch.from_numpy(part) for _, part in answers], dim=-1).double()
    assert logits.shape == (*tokens.shape, config.model.vocab_size)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
    for result, _ in answers:
        assert result == pytest.approx(expected, rel=1e-6)


def pass_of_shapes_only(config):
    """Run forward and backward on tensors without values, which raise an error if the host reads one."""
    (model,), optimizer = build(config)
    shape = config.train.micro_batch_size, config.data.sequence_length
    latent_attention._angles.cache_clear()  # cached tensors have values here, and none below
    with FakeTensorMode(allow_non_fake_inputs=True), optimizer.data_parallel.no_sync():
        tokens = torch.randint(0, config.model.vocab_size, shape)
        with pytest.raises(DataDependentOutputException):
            tokens.sum().item()
        loss = model(tokens, tokens, None, labels=tokens, loss_mask=torch.ones(shape))
        loss.backward()
    latent_attention._angles.cache_clear()
    return tuple(loss.shape)


def test_the_host_reads_no_value(pool):
    assert pool.run(1, pass_of_shapes_only, recipe(dtype="bfloat16")) == [()]
