"""Parameters and FLOPs from a recipe equal Moonlight's published counts, transformers' counts and torch's."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoints.hf_config import hf_config
from moonlight.config.load import load_recipe
from moonlight.dist_checkpoint import hf_mapping
from moonlight.plan.flops import count_parameters, train_flops_per_token
from tests.support.layouts import recipe

ROOT = Path(__file__).parents[2]
BIG = load_recipe(ROOT / "configs/moonlight_16b_a3b/pretrain.yaml")
FAMILY = {"a0.1b": 0.1e9, "a0.4b": 0.4e9, "a1b": 1.0e9}


def family(name):
    return load_recipe(ROOT / f"configs/moonlight_family/{name}.yaml")


def size(model, *prefixes):
    return sum(math.prod(row.shape) for row in hf_mapping.tensor_mappings(model) if row.key.startswith(prefixes))


def test_moonlights_counts():
    counts = count_parameters(BIG.model)
    assert counts.total == 15_960_110_208
    assert counts.total_without_embeddings == 15_289_021_568
    assert counts.activated == 2_243_687_552
    assert counts.activated_with_head == 2_579_231_872


def test_moonlights_parts():
    assert size(BIG.model, "decoder.layers.7.self_attention.") == 13_763_072
    assert size(BIG.model, "decoder.layers.7.mlp.") == 571_080_768
    assert size(BIG.model, "decoder.layers.7.mlp.experts.") == 64 * 8_650_752
    # The released file has 27 more: a stale rotary_emb.inv_freq in every layer.
    assert sum(len(row.hf_tensors) for row in hf_mapping.tensor_mappings(BIG.model)) == 5_344 - 27


def test_moonlights_flops():
    assert f"{train_flops_per_token(BIG.model, 4096):.3e}" == "1.717e+10"
    assert f"{train_flops_per_token(BIG.model, 8192):.3e}" == "1.887e+10"


@pytest.mark.parametrize("model", [BIG.model, family("a0.4b").model, replace(recipe().model, q_lora_rank=24)])
def test_transformers_counts_the_same(model):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    with torch.device("meta"):
        hf_model = DeepseekV3ForCausalLM(DeepseekV3Config(**hf_config(model)))
    biases = (model.num_hidden_layers - model.first_k_dense_replace) * model.num_experts  # buffers in transformers
    assert count_parameters(model).total == sum(p.numel() for p in hf_model.parameters()) + biases
    if model == BIG.model:
        assert biases == 1_664


def test_flops_equal_torchs_count():
    """FLOPs equal torch's count with all experts chosen. Torch counts neither the causal mask nor norms."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    model_config = replace(recipe().model, num_experts_per_tok=8)
    hf_model = DeepseekV3ForCausalLM(DeepseekV3Config(**hf_config(model_config), attn_implementation="eager"))
    hf_model.set_experts_implementation("eager")
    length = 32
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hf_model(torch.zeros(1, length, dtype=torch.long))
    counts = count_parameters(model_config)
    vectors = sum(
        math.prod(r.shape) for r in hf_mapping.tensor_mappings(model_config) if r.hf_tensors[0].init_kind != "matrix"
    )
    unmasked = 2 * (train_flops_per_token(model_config, length) - 6 * counts.activated_with_head)
    assert 3 * counter.get_total_flops() / length == 6 * (counts.activated_with_head - vectors) + unmasked


@pytest.mark.parametrize(("name", "activated"), FAMILY.items())
def test_the_family_has_moonlights_proportions(name, activated):
    config = family(name)
    model_config, heads = config.model, config.model.num_attention_heads
    hidden = 128 * heads
    same_proportions = replace(
        BIG.model,
        num_attention_heads=heads,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 2,
        moe_intermediate_size=hidden * 11 // 16,
        kv_lora_rank=hidden // 4,
        num_hidden_layers=model_config.num_hidden_layers,
    )
    assert model_config == same_proportions
    assert hidden / model_config.num_hidden_layers == pytest.approx(
        BIG.model.hidden_size / BIG.model.num_hidden_layers, rel=0.15
    )
    assert count_parameters(model_config).activated == pytest.approx(activated, rel=0.15)
    assert config.schedule.router_bias_update_rate == 1e-3


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_follows_the_papers_fits(name):
    config = family(name)
    compute = (count_parameters(config.model).activated / 0.0483359) ** (1 / 0.5112684)
    batch = config.train.global_batch_size * config.data.sequence_length
    assert config.data.sequence_length == 8192
    assert config.schedule.lr == pytest.approx(0.0127339 * compute**-0.0574752, rel=0.01)
    assert batch == pytest.approx(0.0065202 * compute**0.4137915, rel=0.12)
    assert batch * config.train.train_steps == pytest.approx(3.4480927 * compute**0.4887316, rel=0.02)
