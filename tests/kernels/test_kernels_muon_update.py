"""The fused passes of an update must be bit-identical to their torch version.

Without a GPU they run in Triton's interpreter.
"""

import pytest
import torch

from moonlight.kernels import muon_update
from moonlight.kernels.muon_update import fused_momentum, fused_weight_update, normalize_pass
from moonlight.optim import master_weights
from moonlight.optim.master_weights import MasterWeight, apply_update
from moonlight.optim.update_rules import apply_updates, update_momentum, update_momentum_norms
from tests.support.kernels import DEVICE, needs_triton, random

pytestmark = [needs_triton, pytest.mark.usefixtures("one_thread")]


def to_bfloat16(exact: torch.Tensor) -> torch.Tensor:
    """Round as a GPU does, or truncate as the interpreter does."""
    if DEVICE == "cuda":
        return exact.bfloat16()
    return (exact.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 64, 64), (3, 50, 100), (1, 7, 11)])
def test_momentum(shape, momentum_dtype, dtype, nesterov, scale):
    gradient, momentum = random(*shape, dtype=dtype), random(*shape, seed=1, dtype=momentum_dtype)
    before, exact = gradient.clone(), momentum.to(torch.float32, copy=True)
    elements = shape[1] * shape[2]
    settings = {"nesterov": nesterov, "scale": scale}
    (expected,) = update_momentum([gradient], [exact], momentum=0.95, **settings)
    direction, norms = fused_momentum(gradient, momentum, elements, factor=0.95, **settings)
    assert direction.dtype is torch.float32 and direction.equal(expected)
    assert momentum.equal(exact if momentum_dtype is torch.float32 else to_bfloat16(exact))
    assert gradient.equal(before)
    # Sums of at most 5,000 squares in float32, in another order than torch.
    torch.testing.assert_close(norms, expected.flatten(1).double().norm(dim=1).float(), rtol=1e-5, atol=0)


def test_norms_do_not_depend_on_the_other_matrices():
    gradient, momentum = random(5, 70, 90), random(5, 70, 90, seed=1)
    parts = [(gradient[i : i + 1], momentum[i : i + 1].clone()) for i in range(5)]
    settings = {"factor": 0.95, "nesterov": True, "scale": 1.0}
    all_matrices = fused_momentum(gradient, momentum, 6300, **settings)
    alone = [fused_momentum(*part, 6300, **settings) for part in parts]
    for batched, single in zip(all_matrices, zip(*alone, strict=True), strict=True):
        assert batched.equal(torch.cat(single))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalization(dtype):
    direction = random(3, 60, 90, dtype=dtype)
    direction[1] = 0
    norms = torch.linalg.vector_norm(direction, dim=(-2, -1), dtype=torch.float32)
    out = torch.full_like(direction, torch.nan, dtype=torch.float16)
    normalize_pass(direction, norms, out)
    assert out.equal((direction.float() / (norms + 1e-7)[:, None, None]).half()) and out[1].eq(0).all()


@pytest.mark.parametrize("factor", [1.0, 0.31])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "weights_dtype, kind", [(torch.float32, "float32"), (torch.bfloat16, "float32"), (torch.bfloat16, "split")]
)
@pytest.mark.parametrize("numel", [4096, 5003, 3])
def test_weights_of_three_steps(numel, weights_dtype, kind, dtype, factor):
    fused, reference = (MasterWeight(random(1, numel, dtype=weights_dtype), kind) for _ in range(2))
    for step in range(3):
        update = random(1, numel, seed=step + 1, dtype=dtype)
        rates = {"learning_rate": 1e-2, "weight_decay": 0.1}
        fused_weight_update(fused._full, fused.weights, fused._remainder, update, factor=factor, **rates)
        values = reference.to_float32()
        apply_updates([values], [update.float() * factor], **rates)
        reference.write(values)
        assert fused.weights.equal(reference.weights) and fused.to_float32().equal(reference.to_float32())
    if kind == "split":
        assert fused._remainder.equal(reference._remainder) and fused._remainder.any()


def test_ties_and_extremes_split_as_in_torch():
    bits = [0x3F808000, 0x3F817FFF, 0x3F818000, 0x00008000, 0x7F7FFFFF, -0x40808000, 0x00000001, 0x7F800000]
    values = torch.tensor(bits, dtype=torch.int32, device=DEVICE).view(torch.float32).reshape(1, -1)
    fused = MasterWeight(master_weights.round_to_bfloat16(values), "split")
    fused._remainder.copy_(master_weights.low_bits(values))
    assert fused.to_float32().view(torch.int32).equal(values.view(torch.int32))
    zero = torch.zeros_like(values)
    fused_weight_update(None, fused.weights, fused._remainder, zero, factor=1.0, learning_rate=0.0, weight_decay=0.0)
    assert fused.to_float32().view(torch.int32).equal(values.view(torch.int32))


def record_calls(monkeypatch, name):
    """Record the calls of a pass."""
    calls = []
    original = getattr(muon_update, name)

    def counting(*arguments, **settings):
        calls.append(name)
        return original(*arguments, **settings)

    monkeypatch.setattr(muon_update, name, counting)
    return calls


def test_the_optimizer_calls_the_fused_passes_with_equal_results(monkeypatch):
    gradients = [random(4, 6), random(10, 3, seed=1)]
    masters = [MasterWeight(random(4, 6, seed=2), "float32"), MasterWeight(random(10, 3, seed=3).bfloat16(), "split")]
    results = []
    for fused in (False, True):
        momenta = [random(4, 6, seed=4), random(10, 3, seed=5)]
        local_masters = [
            MasterWeight(m.weights.clone(), "split" if m._remainder is not None else "float32") for m in masters
        ]
        with monkeypatch.context() as patch:
            calls = record_calls(patch, "fused_momentum") if fused else []
            update_calls = record_calls(patch, "fused_weight_update") if fused else []
            patch.setattr("moonlight.optim.update_rules.can_fuse", lambda tensors, fused=fused: fused)
            patch.setattr("moonlight.optim.master_weights.can_fuse", lambda tensors, fused=fused: fused)
            settings = {"momentum": 0.9, "nesterov": True, "scale": 0.5}
            directions, norms = update_momentum_norms(gradients, momenta, [12, 15], **settings)
            apply_update(
                local_masters, [d.bfloat16() for d in directions], [0.7, 0.9], learning_rate=0.1, weight_decay=0.2
            )
            assert (len(calls), len(update_calls)) == ((2, 2) if fused else (0, 0))
        results.append(
            (directions, momenta, [m.to_float32() for m in local_masters], [m.weights for m in local_masters])
        )
    assert norms is not None
    assert [len(norm) for norm in norms] == [2, 2]
    for direction, norm in zip(directions, norms, strict=True):
        torch.testing.assert_close(norm, direction.view(2, -1).norm(dim=1))
    for plain, fused_result in zip(*results, strict=True):
        # Torch may not fuse the tail of a vector.
        for one, other in zip(plain, fused_result, strict=True):
            torch.testing.assert_close(one, other, rtol=2**-22, atol=1e-7)


def test_invalid_operands_are_refused():
    x = random(4, 6)
    with pytest.raises(AssertionError):
        fused_momentum(x.mT, x.mT, 24, factor=0.9, nesterov=True, scale=1.0)
    with pytest.raises(AssertionError):
        fused_momentum(x, x.clone(), 5, factor=0.9, nesterov=True, scale=1.0)
    with pytest.raises(AssertionError):
        fused_weight_update(None, x.bfloat16(), None, x, factor=1.0, learning_rate=0.1, weight_decay=0.1)
