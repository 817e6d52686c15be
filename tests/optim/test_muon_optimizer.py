"""The plain optimizer must equal a slow reference in float64, and torch's own AdamW."""

import io
import itertools
import math

import numpy as np
import pytest
import torch

from moonlight.optim import muon
from moonlight.optim.muon import Muon
from tests.support.reference import SlowMuon
from tests.support.suites import quick, slow

SHAPES = [(12, 20), (20, 12), (3, 12, 20), (5, 2, 3, 3), (1, 7), (2, 640, 640)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(shapes=SHAPES, dtype=torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(random(*shape, seed=index).to(dtype)) for index, shape in enumerate(shapes)]


def give_gradients(params, step: int, dtype=None) -> list[torch.Tensor]:
    gradients = [random(*p.shape, seed=100 * step + index) for index, p in enumerate(params)]
    for parameter, gradient in zip(params, gradients, strict=True):
        parameter.grad = gradient.to(parameter.dtype if dtype is None else dtype)
    return gradients


def as_matrices(tensor: torch.Tensor) -> list[np.ndarray]:
    array = tensor.detach().float().numpy()
    return list(array) if array.ndim == 3 else [array.reshape(len(array), -1)]


@pytest.mark.parametrize(
    ("name", "nesterov"),
    quick(
        itertools.product(("moonlight", "polar_express"), (True, False)), ("moonlight", True), ("polar_express", False)
    ),
)
def test_three_steps_equal_the_slow_reference(name, nesterov):
    params = parameters()
    references = [[SlowMuon(matrix, nesterov=nesterov, name=name) for matrix in as_matrices(p)] for p in params]
    optimizer = Muon(params, lr=1e-2, nesterov=nesterov, coefficients=name, dtype=torch.float32)
    for step in (1, 2, 3):
        learning_rate = 1e-2 / step
        optimizer.param_groups[0]["lr"] = learning_rate  # as a schedule does
        gradients = give_gradients(params, step)
        optimizer.step()
        for parameter, gradient, matrices in zip(params, gradients, references, strict=True):
            for matrix, grad, reference in zip(as_matrices(parameter), as_matrices(gradient), matrices, strict=True):
                reference.step(grad, learning_rate)
                assert np.linalg.norm(matrix - reference.weight) <= 1e-5 * np.linalg.norm(reference.weight)


@pytest.mark.parametrize("largest", [(1, 7), slow((2, 640, 640))])
@pytest.mark.parametrize("matching", ["adjusted_lr", "update_norm", "baseline"])
def test_each_rms_matching_equals_the_slow_reference(matching, largest):
    """Matrices of one shape are batched; each must get its own RMS."""
    shapes = [*SHAPES[: SHAPES.index(largest) + 1], (20, 12)]  # the last has a zero gradient
    params = parameters(shapes)
    options = {"matching": matching, "hidden_size": 37}
    references = [[SlowMuon(matrix, **options) for matrix in as_matrices(p)] for p in params]
    optimizer = Muon(params, lr=1e-2, rms_matching=matching, hidden_size=37, dtype=torch.float32)
    for step in (1, 2):
        gradients = give_gradients(params, step)
        params[-1].grad = gradients[-1] = torch.zeros(20, 12)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for parameter, gradient, matrices in zip(params, gradients, references, strict=True):
            for matrix, grad, reference in zip(as_matrices(parameter), as_matrices(gradient), matrices, strict=True):
                reference.step(grad, 1e-2)
                assert np.linalg.norm(matrix - reference.weight) <= 1e-5 * np.linalg.norm(reference.weight)
        if matching == "update_norm":
            for old, parameter in zip(before[:-1], params, strict=False):
                for update in as_matrices((old * (1 - 1e-3) - parameter) / 1e-2):
                    assert math.sqrt(np.mean(update**2)) == pytest.approx(0.2, rel=1e-3)


def test_baseline_needs_the_hidden_size():
    with pytest.raises(ValueError, match=r"^hidden_size is 0: it must be an integer of at least 1 for baseline"):
        Muon(parameters([(4, 6)]), lr=1e-2, rms_matching="baseline")


def test_chunks_and_groups_change_only_rounding(monkeypatch):
    shapes = [(12, 20), (7, 12, 20), (12, 20), (20, 12)]
    expected, grouped = parameters(shapes), parameters(shapes)
    single = Muon(expected, lr=1e-2, dtype=torch.float32)
    groups = [{"params": grouped[:1]}, {"params": grouped[1:], "lr": 2e-2, "weight_decay": 0.3}]
    split = Muon(groups, lr=1e-2, dtype=torch.float32)
    give_gradients(expected, 1), give_gradients(grouped, 1)
    single.step()
    monkeypatch.setattr(muon, "WORKSPACE_ELEMENTS", {"cpu": 500})
    split.step()
    torch.testing.assert_close(grouped[0], expected[0])
    for before, a, b in zip(parameters(shapes)[1:], expected[1:], grouped[1:], strict=True):
        update = (before * (1 - 1e-3) - a) / 1e-2
        torch.testing.assert_close(b, before * (1 - 6e-3) - 2e-2 * update, rtol=1e-4, atol=1e-5)


def test_chunks_are_bounded(monkeypatch):
    monkeypatch.setattr(muon, "WORKSPACE_ELEMENTS", {"cpu": 1000})
    sizes = []

    def recording(matrices, *arguments):
        sizes.append(sum(matrix.numel() for matrix in matrices))
        return original(matrices, *arguments)

    original = muon.orthogonalize_all
    monkeypatch.setattr(muon, "orthogonalize_all", recording)
    params = parameters([(10, 20), (30, 10, 20), (10, 20)])
    give_gradients(params, 1)
    Muon(params, lr=1e-2).step()
    assert max(sizes) <= 1000 and sum(sizes) == 32 * 200


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_is_float32_for_all_dtypes(weight, gradient, nesterov):
    parameter = torch.nn.Parameter(random(8, 12).to(weight))
    optimizer = Muon([parameter], lr=1e-2, nesterov=nesterov)
    expected = torch.zeros(8, 12, dtype=torch.float64)
    for step in (1, 2):
        parameter.grad = None
        grad = random(8, 12, seed=step).to(gradient)
        parameter.grad_dtype = gradient
        parameter.grad = grad.clone()
        optimizer.step()
        assert parameter.grad.equal(grad)  # the caller's gradient is unchanged
        expected = 0.95 * expected + grad.double()
        momentum = optimizer.state[parameter]["momentum"]
        assert momentum.dtype is torch.float32
        torch.testing.assert_close(momentum.double(), expected, rtol=1e-6, atol=1e-6)


def test_bfloat16_weights_are_rounded_once():
    exact, rounded = (
        torch.nn.Parameter(random(16, 24).bfloat16().float()),
        torch.nn.Parameter(random(16, 24).bfloat16()),
    )
    for parameter in (exact, rounded):
        parameter.grad = random(16, 24, seed=1).bfloat16().to(parameter.dtype)
        Muon([parameter], lr=1e-1).step()
    assert rounded.equal(exact.bfloat16())


def test_no_gradient_means_decay_only():
    params = parameters()
    before = [p.detach().clone() for p in params]
    for parameter in params:
        parameter.grad = torch.zeros_like(parameter)
    Muon(params, lr=0.02, weight_decay=0.1).step()
    for parameter, weight in zip(params, before, strict=True):
        assert parameter.equal(weight * (1 - 0.02 * 0.1))


def test_adamw_groups_equal_torch():
    shapes = [(7,), (), (5, 6), (2, 3, 4, 5, 2)]
    ours, theirs = parameters(shapes), parameters(shapes)
    optimizer = Muon([{"params": ours, "algorithm": "adamw", "weight_decay": 0.2}], lr=1e-2)
    reference = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.2)
    for step in (1, 2, 3):
        give_gradients(ours, step), give_gradients(theirs, step)
        if step == 2:
            ours[0].grad = theirs[0].grad = None  # its step count lags
        optimizer.step(), reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip(dtype):
    shapes = [(12, 20), (2, 6, 5), (9,)]

    def fresh():
        params = parameters(shapes, dtype)
        return params, Muon([{"params": params[:2]}, {"params": params[2:], "algorithm": "adamw"}], lr=1e-2)

    params, optimizer = fresh()
    give_gradients(params, 1)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    restored_params, restored = fresh()
    restored.load_state_dict(torch.load(file, weights_only=True))
    for restored_param, parameter in zip(restored_params, params, strict=True):
        restored_param.data.copy_(parameter.data)
        for name, value in optimizer.state[parameter].items():
            loaded = restored.state[restored_param][name]
            assert loaded == value if name == "step" else loaded.dtype is torch.float32 and loaded.equal(value)
    give_gradients(params, 2), give_gradients(restored_params, 2)
    optimizer.step(), restored.step()
    assert all(a.equal(b) for a, b in zip(params, restored_params, strict=True))


def test_closure_and_parameters_without_gradient():
    used, unused = parameters([(4, 6), (4, 6)])
    optimizer = Muon([used, unused], lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    before = unused.detach().clone()
    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first and unused.equal(before) and unused not in optimizer.state


def test_sparse_gradients_are_refused():
    weight = torch.nn.Parameter(random(4, 6))
    weight.grad = torch.zeros(4, 6).to_sparse()
    with pytest.raises(ValueError, match=r"parameter 0 \(embed\) has a sparse gradient.*dense"):
        Muon([("embed", weight)], lr=1e-2).step()


@pytest.mark.parametrize("shape", [(7,), (), (2, 3, 4, 5, 6)])
def test_a_muon_group_takes_matrices_only(shape):
    params = parameters([(4, 6), shape])
    with pytest.raises(ValueError, match=r"parameter 1 .*has shape \[.*4-D.*adamw"):
        Muon(params, lr=1e-2)
    optimizer = Muon(params[:1], lr=1e-2)
    with pytest.raises(ValueError, match="parameter 0"):
        optimizer.add_param_group({"params": params[1:]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("lr", math.nan),
        ("lr", "fast"),
        ("weight_decay", math.inf),
        ("momentum", 1.0),
        ("nesterov", 1),
        ("num_steps", 0),
        ("num_steps", 2.5),
        ("coefficients", "other"),
        ("rms_match", 0.0),
        ("rms_matching", "other"),
        ("hidden_size", -1),
        ("hidden_size", 2.0),
        ("dtype", torch.float16),
        ("betas", (0.9, 1.0)),
        ("betas", 0.9),
        ("eps", 0.0),
    ],
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} is .*: it must be"):
        Muon(parameters([(4, 6)]), **({"lr": 1e-2} | {name: value}))


def test_bad_groups_are_named():
    with pytest.raises(ValueError, match="algorithm is 'sgd': it must be one of muon, adamw"):
        Muon([{"params": parameters([(4, 6)]), "algorithm": "sgd"}], lr=1e-2)
    with pytest.raises(ValueError, match=r"parameter 0 .*float16"):
        Muon(parameters([(4, 6)], torch.float16), lr=1e-2)


def test_a_misspelled_group_setting_is_an_error():
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="did you mean 'algorithm'"):
        Muon([{"params": [parameter], "algoritm": "adamw"}], lr=0.1)
