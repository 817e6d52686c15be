"""Every layout must equal one process: initial weights, gradients tensor by tensor, losses."""

import hashlib
import itertools

import numpy as np
import pytest
import torch

from tests.support.comparisons import check_gradients
from tests.support.layouts import LAYOUTS, assemble, first_gradients, recipe, train_losses
from tests.support.suites import quick, slow

OTHER_LAYOUTS = [name for name in LAYOUTS if name != "1"]


def one_process(pool, masked: float = 0.0) -> dict:
    (answer,) = pool.run(1, first_gradients, recipe(), masked)
    return answer | {name: assemble([answer[name]]) for name in ("weights", "gradients")}


@pytest.fixture(scope="module")
def reference(pool):
    return one_process(pool)


@pytest.fixture(scope="module")
def masked_reference(pool):
    return one_process(pool, 0.8)


@pytest.mark.parametrize(
    "layout", quick(OTHER_LAYOUTS, "DP4", "TP2-ETP2", "PP2-interleaved", "EP2xTP2-ETP2-4", "EP2xTP2xPP2")
)
def test_first_step_gradients_equal_one_process(pool, reference, layout):
    world_size, parallel = LAYOUTS[layout]
    answers = pool.run(world_size, first_gradients, recipe(parallel))
    weights = assemble([answer["weights"] for answer in answers])
    assert weights.keys() == reference["weights"].keys()
    for key, value in weights.items():
        assert value.tobytes() == reference["weights"][key].tobytes(), key
    check_gradients(answers, reference)


@pytest.mark.parametrize(
    ("micro_batch_size", "layout", "masked"),
    quick(
        itertools.product((1, 2, 4), ("1", "TP2", "DP2"), (0.0, 0.8)),
        (4, "1", 0.0),
        (1, "DP2", 0.0),
        (1, "TP2", 0.8),
        (4, "DP2", 0.8),
    ),
)
def test_loss_and_gradients_do_not_depend_on_batch_splits(
    pool, reference, masked_reference, layout, micro_batch_size, masked
):
    world_size, parallel = LAYOUTS[layout]
    config = recipe(parallel, micro_batch_size=micro_batch_size)
    answers = pool.run(world_size, first_gradients, config, masked)
    check_gradients(answers, masked_reference if masked else reference)


@pytest.fixture(scope="module")
def reference_losses(pool):
    (losses,) = pool.run(1, train_losses, recipe(), 20)
    assert losses[-1] < losses[0]
    return losses


@pytest.mark.parametrize(
    ("layout", "steps"),
    [*((name, 10) for name in ("TP2", "EP2xTP2-ETP2-4")), *(slow(name, 20) for name in OTHER_LAYOUTS)],
)
def test_losses_equal_one_process(pool, reference_losses, layout, steps):
    world_size, parallel = LAYOUTS[layout]
    for losses in pool.run(world_size, train_losses, recipe(parallel), steps):
        assert losses == pytest.approx(reference_losses[:steps], rel=1e-5)


def test_initial_weights_follow_from_seed_and_hugging_face_name(reference):
    """Each matrix must follow only from the recipe's seed and the tensor's name in an exported folder."""
    config = recipe()

    def draw(name, shape, seed=config.train.seed):
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return config.model.initializer_range * torch.randn(shape, generator=generator).numpy()

    weights = reference["weights"]
    up = weights["decoder.layers.2.mlp.experts.up_proj"][5]
    np.testing.assert_array_equal(up, draw("model.layers.2.mlp.experts.5.up_proj.weight", up.shape))
    gate, _ = np.split(weights["decoder.layers.0.mlp.linear_fc1.weight"], 2)
    np.testing.assert_array_equal(gate, draw("model.layers.0.mlp.gate_proj.weight", gate.shape))
    assert (gate != draw("model.layers.0.mlp.gate_proj.weight", gate.shape, seed=6)).any()
