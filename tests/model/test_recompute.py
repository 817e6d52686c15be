"""Recomputation in the backward pass must be bit-identical, and count nothing twice."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from moonlight.config.load import parse_run_config, to_yaml
from moonlight.errors import UserError
from tests.support.layouts import LAYOUTS, build, flatten_gradients, local_batches, recipe
from tests.support.suites import quick

MODULES = {"layernorm": ("layernorm",), "mlp_act": ("mlp_act",), "mla_up_proj": ("mla_up_proj",)}
MODULES |= {"all three": tuple(MODULES), "layer": ("layer",)}


def one_pass(config):
    """Return all results of a forward and backward pass on this rank, after a pass without gradients."""
    from moonlight.train.forward_backward import find_attentions, find_routers, forward_backward

    model_chunks, optimizer = build(config)
    optimizer.data_parallel.zero_grad_buffer()
    batches = local_batches(config, 0)
    with torch.no_grad():
        forward_backward(model_chunks, config, batches, forward_only=True)
    loss, _ = forward_backward(model_chunks, config, batches, recorded_batches=1)
    results = {"loss": loss.numpy()}
    results |= {f"{key} {offset}": values for key, _, offset, values in flatten_gradients(optimizer)}
    for router in find_routers(model_chunks):
        results[f"count {router.layer_number}"] = router.tokens_per_expert.numpy()
        results[f"aux {router.layer_number}"] = router.aux_loss.numpy()
    results |= {f"logits {a.layer_number}": a.max_logits.numpy() for a in find_attentions(model_chunks)}
    return results


def check_bit_identical(pool, layout, config, modules):
    world_size, _ = LAYOUTS[layout]
    recomputing_config = replace(config, train=replace(config.train, recompute_modules=modules))
    for plain, result in zip(
        pool.run(world_size, one_pass, config), pool.run(world_size, one_pass, recomputing_config), strict=True
    ):
        assert plain.keys() == result.keys() and any("gradient" in key or "." in key for key in plain)
        for key, values in plain.items():
            assert np.isfinite(values).all() and np.array_equal(values, result[key]), key


@pytest.mark.parametrize(
    ("modules", "layout"),
    quick(
        itertools.product(("all three", "layer"), ("1", "TP2", "PP2", "EP2")),
        ("all three", "1"),
        ("all three", "TP2"),
        ("layer", "PP2"),
        ("layer", "EP2"),
    ),
)
def test_recompute_is_bit_identical(pool, layout, modules):
    check_bit_identical(pool, layout, recipe(LAYOUTS[layout][1]), MODULES[modules])


@pytest.mark.parametrize("modules", quick(MODULES, "all three", "layer"))
def test_recompute_is_bit_identical_in_bfloat16(pool, modules):
    """Recomputation must be bit-identical with low-rank queries and masked documents."""
    config = recipe(dtype="bfloat16")
    config = replace(
        config,
        model=replace(config.model, q_lora_rank=24),
        data=replace(config.data, mask_documents=True, reset_positions=True),
    )
    check_bit_identical(pool, "1", config, MODULES[modules])


def test_module_names_are_checked():
    tree = yaml.safe_load(to_yaml(recipe()))
    for names, words in (
        (["norm"], "train.recompute_modules names 'norm': accepted are 'layernorm', 'mlp_act', 'mla_up_proj', 'layer'"),
        (["layer", "mlp_act"], "train.recompute_modules is layer, mlp_act: layer includes all others"),
        ("layer", "train.recompute_modules is 'layer'"),
    ):
        tree["train"]["recompute_modules"] = names
        with pytest.raises(UserError) as caught:
            parse_run_config(tree)
        assert words in str(caught.value)
    tree["train"]["recompute_modules"] = ["layernorm", "mlp_act"]
    assert parse_run_config(tree).train.recompute_modules == ("layernorm", "mlp_act")
