"""The optimizer's update on one process must equal a slow, obvious reference and torch's own AdamW."""

import math

import numpy as np
import pytest
import torch

from moonlight.placement.param_groups import PARAM_GROUP_RULES, ParamGroupRule, match_rules
from tests.support.layouts import assemble, build, collect, flatten_gradients, local_batches, recipe
from tests.support.reference import slow_newton_schulz


def test_every_parameter_needs_a_rule():
    with pytest.raises(ValueError, match=r"decoder\.layers\.0\.new\.weight"):
        match_rules(["embedding.word_embeddings.weight", "decoder.layers.0.new.weight"])


def test_no_parameter_may_match_twice():
    rules = (ParamGroupRule(pattern="a*", algorithm="adamw"), ParamGroupRule(pattern="a*", algorithm="muon"))
    with pytest.raises(ValueError, match=r"twice: a1, a2"):
        match_rules(["a1", "a2"], rules)
    with pytest.raises(ValueError, match=r"twice: b"):
        match_rules(["b", "b"], (ParamGroupRule(pattern="*", algorithm="muon"),))


def test_the_first_rule_that_matches_wins():
    rules = (ParamGroupRule(pattern="a.*", algorithm="adamw"), ParamGroupRule(pattern="*", algorithm="muon"))
    assert match_rules(["a.b", "b"], rules)["a.b"].algorithm == "adamw"
    assert match_rules(["a.b", "b"], rules)["b"].algorithm == "muon"
    assert match_rules(["decoder.layers.3.mlp.linear_fc1.weight"], PARAM_GROUP_RULES).popitem()[1].num_matrices == 2


def two_updates(config):
    """Return the initial weights, then weights, gradients and gradient norm of each of two steps."""
    from moonlight.train.forward_backward import forward_backward

    model_chunks, optimizer = build(config)
    history = [(collect(model_chunks), None, None)]
    for step in (1, 2):
        optimizer.data_parallel.zero_grad_buffer()
        forward_backward(model_chunks, config, local_batches(config, step))
        norm = math.hypot(*optimizer.gradient_norms().values())
        gradients = flatten_gradients(optimizer)
        optimizer.step(learning_rate=1e-2, weight_decay=0.1, step=step, gradient_norm=norm)
        optimizer.data_parallel.finish_param_sync()
        history.append((collect(model_chunks), gradients, norm))
    return history


def hugging_face_matrices(key: str, tensor: np.ndarray) -> list[np.ndarray]:
    """Return views of the matrices in a checkpoint tensor, one per Hugging Face matrix."""
    if "linear_fc1" in key:
        return list(np.split(tensor, 2))
    return list(tensor) if tensor.ndim == 3 else [tensor]


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_two_steps_equal_the_slow_reference(pool, name):
    from dataclasses import replace

    config = recipe()
    config = replace(config, optimizer=replace(config.optimizer, name=name, clip_grad_norm=0.5))
    (history,) = pool.run(1, two_updates, config)
    weights, *after = [(assemble([w]), assemble([g]) if g is not None else {}, norm) for w, g, norm in history]
    weights = weights[0]
    on_muon = {key for key in weights if name == "muon" and not key.endswith("layernorm.weight")}
    on_muon -= {"embedding.word_embeddings.weight", "output_layer.weight"}
    momentum = {key: np.zeros_like(value, dtype=np.float64) for key, value in weights.items()}
    adamw_params = {
        key: torch.nn.Parameter(torch.from_numpy(value).double())
        for key, value in weights.items()
        if key not in on_muon and not key.endswith("expert_bias")
    }
    adamw = torch.optim.AdamW(adamw_params.values(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    expected = {key: value.astype(np.float64) for key, value in weights.items()}
    for updated, gradients, norm in after:
        assert norm == pytest.approx(math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values())))
        assert norm > 0.5  # clipping is active
        scale = 0.5 / norm
        for key in on_muon & gradients.keys():
            gradient = gradients[key] * scale
            momentum[key] = 0.95 * momentum[key] + gradient
            nesterov = gradient + 0.95 * momentum[key]
            for weight, direction in zip(
                hugging_face_matrices(key, expected[key]), hugging_face_matrices(key, nesterov), strict=True
            ):
                update = 0.2 * math.sqrt(max(weight.shape)) * slow_newton_schulz(direction, 5, "moonlight")
                weight -= 1e-2 * (update + 0.1 * weight)
        for key, parameter in adamw_params.items():
            parameter.grad = torch.from_numpy(gradients[key] * scale).double()
        adamw.step()
        expected |= {key: parameter.detach().numpy() for key, parameter in adamw_params.items()}
        for key, value in updated.items():
            error = np.linalg.norm(value - expected[key]) / max(np.linalg.norm(expected[key]), 1e-12)
            assert error < 1e-5, (key, error)
