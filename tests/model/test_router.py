"""Each rule of the router must equal a slow version of its formula."""

import numpy as np
import pytest
import torch

from moonlight.model.router import choose_experts
from tests.support.layouts import LAYOUTS, build, one_step, recipe


def slow_choice(scores, bias, k, groups, topk_group):
    """Choose per token the best groups by the sum of their two best experts, then the best experts of these groups."""
    chosen = []
    for row in scores:
        candidate = row + bias
        per_group = np.split(np.arange(len(row)), groups)
        quality = [np.sort(candidate[group])[-2:].sum() for group in per_group]
        best = np.argsort(quality)[::-1][:topk_group]
        eligible = np.concatenate([per_group[group] for group in best])
        chosen.append(set(eligible[np.argsort(candidate[eligible])[::-1][:k]].tolist()))
    return chosen


@pytest.mark.parametrize(("experts", "k", "groups", "topk_group"), [(8, 2, 1, 1), (16, 4, 4, 2), (12, 3, 3, 1)])
def test_choice_of_experts(experts, k, groups, topk_group):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(50, experts, generator=generator)
    bias = torch.randn(experts, generator=generator) - 1.0  # negative: the zeros of an ineligible group must not win
    chosen = choose_experts(scores, bias, k, groups, topk_group)
    expected = slow_choice(scores.numpy(), bias.numpy(), k, groups, topk_group)
    assert [set(row.tolist()) for row in chosen] == expected


def biases_after_a_step(config):
    """Train one step; return biases per layer, this rank's choices and scores of experts, and the auxiliary loss."""
    from moonlight.train.forward_backward import find_routers

    model_chunks, optimizer = build(config)
    choices, scores = [], []
    for router in find_routers(model_chunks):
        router.register_forward_hook(lambda module, args, out: choices.append((module.layer_number, out[1].numpy())))
        router.register_forward_hook(
            lambda module, args, out: scores.append(
                (module.layer_number, (args[0].detach() @ module.weight.detach().T).sigmoid().numpy())
            )
        )
    result = one_step(model_chunks, optimizer, config, 1)
    return [router.expert_bias.numpy() for router in find_routers(model_chunks)], choices, scores, result.aux_loss


@pytest.mark.parametrize("layout", ["1", "DP2", "TP2"])
def test_bias_moves_by_the_mean_sign_rule_on_the_counts_of_all_ranks(pool, layout):
    world_size, parallel = LAYOUTS[layout]
    answers = pool.run(world_size, biases_after_a_step, recipe(parallel))
    layers = sorted({layer for layer, _ in answers[0][1]})
    for index, layer in enumerate(layers):
        experts = recipe().model.num_experts
        counts = sum(
            np.bincount(chosen.flatten(), minlength=experts)
            for answer in answers
            for choice_layer, chosen in answer[1]
            if choice_layer == layer
        )
        signs = np.sign(counts.mean() - counts)
        expected = 1e-3 * (signs - signs.mean())
        assert np.abs(expected).max() > 0
        for biases, _, _, _ in answers:
            np.testing.assert_allclose(biases[index], expected, atol=1e-8)


def test_auxiliary_loss_is_the_formula(pool):
    """The loss must equal DeepSeek-V3 eq. 17 to 20 by loops, summed over layers and averaged over sequences."""
    config = recipe()
    ((_, _, scores, aux_loss),) = pool.run(1, biases_after_a_step, config)
    k, experts = config.model.num_experts_per_tok, config.model.num_experts
    total = 0.0
    for _, batch in scores:  # [sequence, batch, experts]
        for sequence in batch.swapaxes(0, 1):
            length = len(sequence)
            counts = np.zeros(experts)
            means = np.zeros(experts)
            for token in sequence:
                counts[np.argsort(token)[::-1][:k]] += 1
                means += token / token.sum() / length
            total += (counts * experts / (k * length) * means).sum()
    assert aux_loss == pytest.approx(total / config.train.global_batch_size, rel=1e-5)
