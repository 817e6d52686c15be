"""The model against transformers' DeepseekV3ForCausalLM on the same weights: logits and choices of experts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.layouts import assemble, build, collect, recipe

SHAPES = {
    "moonlight": {},
    "q_lora": {"q_lora_rank": 24},
    "groups": {"num_experts": 16, "num_expert_groups": 4, "topk_group": 2, "num_experts_per_tok": 4},
    "three-dense": {"first_k_dense_replace": 3, "num_experts": 64, "num_experts_per_tok": 6},
    "all-dense": {"first_k_dense_replace": 4},
    "wide-heads": {
        "qk_nope_head_dim": 12,
        "v_head_dim": 20,
        "num_attention_heads": 2,
        "num_shared_experts": 1,
    },
    "groups-q_lora": {
        "q_lora_rank": 16,
        "num_experts": 32,
        "num_expert_groups": 8,
        "topk_group": 3,
        "num_experts_per_tok": 5,
        "first_k_dense_replace": 2,
    },
}


def forward(run, tokens):
    """Logits [batch, sequence, vocabulary] and the experts chosen by each router, with biases that matter."""
    from moonlight.train.forward_backward import find_routers

    (model,), _ = build(run)
    for router in find_routers([model]):
        generator = torch.Generator().manual_seed(router.layer_number)
        router.expert_bias.copy_(0.2 * torch.randn(router.expert_bias.shape, generator=generator))
    choices = []
    hooks = [
        router.register_forward_hook(lambda module, args, out: choices.append(out[1].numpy()))
        for router in find_routers([model])
    ]
    model.eval()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        logits = model(tokens, positions, None)
    for hook in hooks:
        hook.remove()
    return logits.numpy(), choices, collect([model])


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_routes_equal_transformers(pool, shape):
    from transformers import DeepseekV3ForCausalLM

    from checkpoints.hf_config import hf_config
    from moonlight.dist_checkpoint import hf_mapping

    run = recipe()
    run = replace(run, model=replace(run.model, **SHAPES[shape]))
    tokens = torch.randint(0, run.model.vocab_size, (3, 48), generator=torch.Generator().manual_seed(0))
    ((logits, choices, weights),) = pool.run(1, forward, run, tokens)

    from transformers import DeepseekV3Config

    model = DeepseekV3ForCausalLM(DeepseekV3Config(**hf_config(run.model))).float().eval()
    whole = assemble([weights])
    state = {}
    for row in hf_mapping.tensor_mappings(run.model):
        for part in row.hf_tensors:
            value = torch.from_numpy(whole[row.key])[part.index]
            state[part.name] = value
    model.load_state_dict(fuse_experts(state, run.model))
    theirs = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, args, out: theirs.append(out[2]))
        for layer in model.model.layers[run.model.first_k_dense_replace :]
    ]
    with torch.no_grad():
        expected = model(tokens).logits.numpy()
    for hook in hooks:
        hook.remove()
    assert np.abs(logits - expected).max() <= 1e-4
    assert np.abs(expected).max() > 0.1  # the comparison is of something
    for ours, indices in zip(choices, theirs, strict=True):
        # Megatron's tokens run sequence-first, transformers' batch-first.
        reordered = ours.reshape(48, 3, -1).swapaxes(0, 1).reshape(48 * 3, -1)
        assert (np.sort(reordered) == np.sort(indices.numpy())).all()


def fuse_experts(state, model):
    """transformers' in-memory form: the experts of a layer stacked, gate over up."""
    fused = {name: value for name, value in state.items() if ".mlp.experts." not in name}
    for layer in range(model.first_k_dense_replace, model.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        stack = {
            kind: torch.stack([state[f"{prefix}{expert}.{kind}_proj.weight"] for expert in range(model.num_experts)])
            for kind in ("gate", "up", "down")
        }
        fused[f"{prefix}gate_up_proj"] = torch.cat([stack["gate"], stack["up"]], dim=1)
        fused[f"{prefix}down_proj"] = stack["down"]
    return fused
