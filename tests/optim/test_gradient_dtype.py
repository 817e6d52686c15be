"""Gradient sums in bfloat16: half the memory and half the bytes to owners, who add up in float32."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from tests.support.layouts import LAYOUTS, assemble, build, first_gradients, recipe, train_losses
from tests.support.suites import quick

ROUNDING = 2**-8


def in_dtype(gradient_dtype, parallel, **train):
    run = recipe(parallel, dtype="bfloat16", **train)
    return replace(run, optimizer=replace(run.optimizer, gradient_dtype=gradient_dtype))


def sums(pool, gradient_dtype, layout):
    """The world's gradient sums of the first step, by parameter."""
    world_size, parallel = LAYOUTS[layout]
    answers = pool.run(world_size, first_gradients, in_dtype(gradient_dtype, parallel))
    return assemble([answer["gradients"] for answer in answers])


@pytest.mark.parametrize("layout", quick(["1", "DP2", "TP2", "EP2xTP2-4", "PP2"], "DP2", "TP2", "PP2", "EP2xTP2-4"))
def test_sums_are_rounded_once_a_micro_batch(pool, layout):
    """Rounding errors of a sum of four micro-batches are independent: at most the root of four times one."""
    exact, rounded = (sums(pool, dtype, layout) for dtype in ("float32", "bfloat16"))
    assert exact.keys() == rounded.keys()
    changed = 0
    for key, values in exact.items():
        distance = np.linalg.norm(rounded[key] - values)
        assert distance <= 2 * ROUNDING * np.linalg.norm(values), key
        changed += distance > 0
    assert changed > len(exact) / 2


def places(run):
    """dtypes of this rank's sums, and of what its owners hold."""
    _, optimizer = build(run)
    data_parallel = optimizer.data_parallel
    return (
        {str(parameter.torch_param.main_grad.dtype) for parameter in data_parallel.parameters},
        {str(gradient.dtype) for _, _, gradient in data_parallel.owned_shards()},
    )


def test_owners_hold_float32(pool):
    """One process alone has no second copy of them."""
    for layout, held in (("DP2", "torch.float32"), ("1", "torch.bfloat16")):
        world_size, parallel = LAYOUTS[layout]
        for answer in pool.run(world_size, places, in_dtype("bfloat16", parallel)):
            assert answer == ({"torch.bfloat16"}, {held})


@pytest.mark.parametrize(
    ("layout", "name"), quick(itertools.product(("1", "DP2"), ("muon", "adamw")), ("DP2", "muon"), ("DP2", "adamw"))
)
def test_training_goes_the_same_way(pool, layout, name):
    world_size, parallel = LAYOUTS[layout]
    courses = []
    for dtype in ("float32", "bfloat16"):
        run = in_dtype(dtype, parallel)
        run = replace(run, optimizer=replace(run.optimizer, name=name))
        courses.append(np.array(pool.run(world_size, train_losses, run, 6)[0]))
    assert np.abs(courses[0] - courses[1]).max() < 0.02 and courses[1][-1] < courses[1][0]
