"""Checkpoints: written under one layout, continued under another."""

import itertools

import pytest
from layouts import LAYOUTS, load_frozen, recipe, restart, train_losses

NAMES = list(LAYOUTS)
SPANNING = list(zip(NAMES, NAMES[1:] + NAMES[:1], strict=True))
"""A cycle: every layout writes once and reads once."""


@pytest.fixture(scope="module")
def expected(pool):
    """The losses of steps 4 to 8 of a run that never stopped."""
    (losses,) = pool.run(1, train_losses, recipe(), 8)
    return losses[3:]


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory):
    """Folder of a checkpoint after three steps, by the layout that wrote it."""
    folders = {}

    def save(layout):
        if layout not in folders:
            world_size, parallel = LAYOUTS[layout]
            folders[layout] = tmp_path_factory.mktemp("checkpoints") / layout
            pool.run(world_size, restart, recipe(parallel), folders[layout], 3, False)
        return folders[layout]

    return save


def check(pool, saved, expected, writer, reader):
    world_size, parallel = LAYOUTS[reader]
    for losses in pool.run(world_size, restart, recipe(parallel), saved(writer), 5, True):
        assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("writer", "reader"), SPANNING)
def test_next_losses_are_the_same_under_another_layout(pool, saved, expected, writer, reader):
    check(pool, saved, expected, writer, reader)


@pytest.mark.full
@pytest.mark.parametrize(
    ("writer", "reader"), [pair for pair in itertools.permutations(NAMES, 2) if pair not in SPANNING]
)
def test_every_ordered_pair_of_layouts(pool, saved, expected, writer, reader):
    check(pool, saved, expected, writer, reader)


def test_a_parameter_frozen_since_is_named(pool, saved):
    (message,) = pool.run(1, load_frozen, recipe(), saved("1"))
    assert "optimizer.momentum.decoder.layers.1.mlp.router.weight" in message
