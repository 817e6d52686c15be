"""Pipelines whose last stage has one layer less, because the head counts as a layer: training, saving, refusals."""

from dataclasses import replace

import pytest

from moonlight.config.parallel import ParallelConfig
from moonlight.config.pipeline import stage_layers
from moonlight.errors import UserError
from tests.support.comparisons import check_gradients
from tests.support.layouts import assemble, first_gradients, recipe, restart, train_losses
from tests.support.suites import quick

CASES = {
    "7 on PP2": (7, ParallelConfig(pipeline_parallel_size=2)),
    "7 on PP4": (7, ParallelConfig(pipeline_parallel_size=4)),
    "3 on PP2": (3, ParallelConfig(pipeline_parallel_size=2)),
    "3 on PP4": (3, ParallelConfig(pipeline_parallel_size=4)),
    "3 on PP2 with EP2": (3, ParallelConfig(pipeline_parallel_size=2, expert_parallel_size=2)),
    "7 on PP2, interleaved": (7, ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_parallel_size=2)),
    "7 on PP2 with TP2": (7, ParallelConfig(pipeline_parallel_size=2, tensor_parallel_size=2)),
}


def make_config(num_layers, parallel=ParallelConfig()):  # noqa: B008
    config = recipe(parallel)
    return replace(config, model=replace(config.model, num_hidden_layers=num_layers))


def num_processes(parallel):
    return parallel.pipeline_parallel_size * max(parallel.expert_parallel_size, parallel.tensor_parallel_size)


@pytest.fixture(scope="module")
def reference(pool):
    """Gradients of the first step on one process, by number of layers."""
    cache = {}

    def compute(num_layers):
        if num_layers not in cache:
            (answer,) = pool.run(1, first_gradients, make_config(num_layers))
            cache[num_layers] = answer | {"gradients": assemble([answer["gradients"]])}
        return cache[num_layers]

    return compute


@pytest.mark.parametrize("case", quick(CASES, "7 on PP4", "3 on PP2 with EP2", "7 on PP2 with TP2"))
def test_gradients_equal_one_process(pool, reference, case):
    num_layers, parallel = CASES[case]
    answers = pool.run(num_processes(parallel), first_gradients, make_config(num_layers, parallel))
    check_gradients(answers, reference(num_layers))


@pytest.mark.parametrize(
    ("writer", "reader"),
    quick([("7 on PP4", None), (None, "7 on PP4"), ("7 on PP4", "7 on PP2")], ("7 on PP4", "7 on PP2")),
)
def test_checkpoints_load_in_other_layouts(pool, tmp_path, writer, reader):
    one_process = (7, ParallelConfig())
    (expected,) = pool.run(1, train_losses, make_config(7), 4)
    for case, steps, load in ((writer, 2, False), (reader, 2, True)):
        num_layers, parallel = CASES[case] if case else one_process
        answers = pool.run(num_processes(parallel), restart, make_config(num_layers, parallel), tmp_path, steps, load)
    assert answers[0] == pytest.approx(expected[2:], rel=1e-5)


def test_layers_of_stages():
    assert [[len(c) for c in stage] for stage in stage_layers(27, 4, 1)] == [[7], [7], [7], [6]]
    assert stage_layers(8, 2, 2) == [[range(0, 2), range(4, 6)], [range(2, 4), range(6, 8)]]
    assert stage_layers(7, 2, 2) == [[range(0, 2), range(4, 6)], [range(2, 4), range(6, 7)]]
    assert stage_layers(4, 1, 1) == [[range(4)]]


def test_indivisible_layers_are_refused():
    words = r"num_hidden_layers is 4: it, or one more \(the head .*\), must be a multiple of .* \(3\)"
    with pytest.raises(UserError, match=words):
        recipe(ParallelConfig(pipeline_parallel_size=3))
