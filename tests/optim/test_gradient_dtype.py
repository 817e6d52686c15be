"""Gradient sums in bfloat16: half the memory and half the bytes to the owner ranks, which sum in float32."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from tests.support.layouts import LAYOUTS, assemble, build, first_gradients, recipe, train_losses
from tests.support.suites import quick

ROUNDING = 2**-8


def in_dtype(gradient_dtype, parallel, **train):
    config = recipe(parallel, dtype="bfloat16", **train)
    return replace(config, optimizer=replace(config.optimizer, gradient_dtype=gradient_dtype))


def sums(pool, gradient_dtype, layout):
    """Return the gradients of the first step, summed over all ranks, by parameter."""
    world_size, parallel = LAYOUTS[layout]
    answers = pool.run(world_size, first_gradients, in_dtype(gradient_dtype, parallel))
    return assemble([answer["gradients"] for answer in answers])


@pytest.mark.parametrize("layout", quick(["1", "DP2", "TP2", "EP2xTP2-4", "PP2"], "DP2", "TP2", "PP2", "EP2xTP2-4"))
def test_sums_are_rounded_once_a_micro_batch(pool, layout):
    """The error must be at most twice one rounding: the errors of four micro-batches are independent."""
    exact, rounded = (sums(pool, dtype, layout) for dtype in ("float32", "bfloat16"))
    assert exact.keys() == rounded.keys()
    changed = 0
    for key, values in exact.items():
        error = np.linalg.norm(rounded[key] - values)
        assert error <= 2 * ROUNDING * np.linalg.norm(values), key
        changed += error > 0
    assert changed > len(exact) / 2


def gradient_dtypes(config):
    """Return the dtypes of this rank's gradient sums, and of its owned shards."""
    _, optimizer = build(config)
    data_parallel = optimizer.data_parallel
    return (
        {str(parameter.torch_param.main_grad.dtype) for parameter in data_parallel.parameters},
        {str(gradient.dtype) for _, _, gradient in data_parallel.owned_shards()},
    )


def test_owners_hold_float32(pool):
    """Owned gradients must be float32 in several processes; a single process keeps no second copy."""
    for layout, owned_dtype in (("DP2", "torch.float32"), ("1", "torch.bfloat16")):
        world_size, parallel = LAYOUTS[layout]
        for answer in pool.run(world_size, gradient_dtypes, in_dtype("bfloat16", parallel)):
            assert answer == ({"torch.bfloat16"}, {owned_dtype})


@pytest.mark.parametrize(
    ("layout", "name"), quick(itertools.product(("1", "DP2"), ("muon", "adamw")), ("DP2", "muon"), ("DP2", "adamw"))
)
def test_losses_agree_between_gradient_dtypes(pool, layout, name):
    world_size, parallel = LAYOUTS[layout]
    losses = []
    for dtype in ("float32", "bfloat16"):
        config = in_dtype(dtype, parallel)
        config = replace(config, optimizer=replace(config.optimizer, name=name))
        losses.append(np.array(pool.run(world_size, train_losses, config, 6)[0]))
    assert np.abs(losses[0] - losses[1]).max() < 0.02 and losses[1][-1] < losses[1][0]
