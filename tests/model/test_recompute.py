"""What is made again for the backward pass: the same bits, and nothing counted twice."""

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


def one_pass(run):
    """Everything that a forward and backward pass leaves behind on this rank, and does a pass without gradients."""
    from moonlight.train.forward_backward import find_attentions, find_routers, forward_backward

    models, optimizer = build(run)
    optimizer.data_parallel.zero_grad_buffer()
    batches = local_batches(run, 0)
    with torch.no_grad():
        forward_backward(models, run, batches, forward_only=True)
    loss, _ = forward_backward(models, run, batches, recorded_batches=1)
    left = {"loss": loss.numpy()}
    left |= {f"{key} {offset}": values for key, _, offset, values in flatten_gradients(optimizer)}
    for router in find_routers(models):
        left[f"count {router.layer_number}"] = router.tokens_per_expert.numpy()
        left[f"aux {router.layer_number}"] = router.aux_loss.numpy()
    left |= {f"logits {a.layer_number}": a.max_logits.numpy() for a in find_attentions(models)}
    return left


def same(pool, layout, run, modules):
    world_size, _ = LAYOUTS[layout]
    again = replace(run, train=replace(run.train, recompute_modules=modules))
    for plain, found in zip(pool.run(world_size, one_pass, run), pool.run(world_size, one_pass, again), strict=True):
        assert plain.keys() == found.keys() and any("gradient" in key or "." in key for key in plain)
        for key, values in plain.items():
            assert np.isfinite(values).all() and np.array_equal(values, found[key]), key


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
def test_the_same_bits(pool, layout, modules):
    same(pool, layout, recipe(LAYOUTS[layout][1]), MODULES[modules])


@pytest.mark.parametrize("modules", quick(MODULES, "all three", "layer"))
def test_the_same_bits_in_bfloat16(pool, modules):
    """With low-rank queries and documents kept apart."""
    run = recipe(dtype="bfloat16")
    run = replace(
        run, model=replace(run.model, q_lora_rank=24), data=replace(run.data, mask_documents=True, reset_positions=True)
    )
    same(pool, "1", run, MODULES[modules])


def test_names():
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
