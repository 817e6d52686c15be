"""Logits and choices of experts must equal those of transformers' DeepseekV3ForCausalLM on the same weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.hugging_face import forward, fuse_experts
from tests.support.layouts import assemble, recipe

SHAPES = {
    "moonlight": {},
    "q_lora": {"q_lora_rank": 24},
    "groups": {"num_experts": 16, "num_expert_groups": 4, "topk_group": 2, "num_experts_per_tok": 4},
    "three-dense": {"first_k_dense_replace": 3, "num_experts": 64, "num_experts_per_tok": 6},
    "all-dense": {"first_k_dense_replace": 4},
    "wide-heads": {"qk_nope_head_dim": 12, "v_head_dim": 20, "num_attention_heads": 2, "num_shared_experts": 1},
    "groups-q_lora": {
        "q_lora_rank": 16,
        "num_experts": 32,
        "num_expert_groups": 8,
        "topk_group": 3,
        "num_experts_per_tok": 5,
        "first_k_dense_replace": 2,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_routes_equal_transformers(pool, shape):
    from transformers import DeepseekV3ForCausalLM

    from checkpoints.hf_config import hf_config
    from moonlight.dist_checkpoint import hf_mapping

    config = recipe()
    config = replace(config, model=replace(config.model, **SHAPES[shape]))
    tokens = torch.randint(0, config.model.vocab_size, (3, 48), generator=torch.Generator().manual_seed(0))
    ((logits, choices, weights),) = pool.run(1, forward, config, tokens)

    from transformers import DeepseekV3Config

    model = DeepseekV3ForCausalLM(DeepseekV3Config(**hf_config(config.model))).float().eval()
    full = assemble([weights])
    state = {}
    for mapping in hf_mapping.tensor_mappings(config.model):
        for hf_tensor in mapping.hf_tensors:
            value = torch.from_numpy(full[mapping.key])[hf_tensor.index]
            state[hf_tensor.name] = value
    model.load_state_dict(fuse_experts(state, config.model))
    reference_choices = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, args, out: reference_choices.append(out[2]))
        for layer in model.model.layers[config.model.first_k_dense_replace :]
    ]
    with torch.no_grad():
        expected = model(tokens).logits.numpy()
    for hook in hooks:
        hook.remove()
    assert np.abs(logits - expected).max() <= 1e-4
    assert np.abs(expected).max() > 0.1  # the logits are not trivially small
    for chosen, indices in zip(choices, reference_choices, strict=True):
        # Megatron orders tokens sequence-first, transformers batch-first.
        reordered = chosen.reshape(48, 3, -1).swapaxes(0, 1).reshape(48 * 3, -1)
        assert (np.sort(reordered) == np.sort(indices.numpy())).all()
