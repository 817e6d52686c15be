"""Gradients leave while the backward pass goes on, and weights return while the next forward pass goes on."""

from typing import Any

import pytest

from tests.support.layouts import LAYOUTS, Recipe, build, one_step, recipe
from tests.support.suites import quick


def watch(run: Recipe) -> dict[str, Any]:
    """Two steps. Per bucket of each lane: parameters without a gradient when it was sent, by the second backward pass;
    and rounds of weights still to come when the first module of the second forward pass runs, and when the last does.
    """
    models, optimizer = build(run)
    lanes = optimizer.data_parallel.bucket_groups
    sent: list[list[int]] = [[] for _ in lanes]
    left: list[int] = []
    one_step(models, optimizer, run, 2)  # the first is watched: weights are waited for

    for lane, log in zip(lanes, sent, strict=True):

        def reduce_next(lane=lane, log=log, real=lane._start_next_reduce_scatter):
            log.append(sum(map(len, lane._missing_grads)))
            real()

        lane._start_next_reduce_scatter = reduce_next

    def look(*_: Any) -> None:
        left.append(sum(len(lane._to_gather) + len(lane._in_flight) for lane in lanes))

    handles = [module.register_forward_pre_hook(look) for model in models for module in model.modules()]
    one_step(models, optimizer, run, 3)
    for handle in handles:
        handle.remove()
    rounds = sum(len(bucket.rounds) for lane in lanes for bucket in lane.buckets)
    return {"sent": sent, "left": left, "rounds": rounds, "buckets": [len(lane.buckets) for lane in lanes]}


@pytest.mark.parametrize("layout", quick(["DP2", "EP2xDP2", "EP2xPP2", "EP2xTP2-4"], "DP2", "EP2xPP2", "EP2xTP2-4"))
def test_communication_overlaps_computation(pool, layout):
    world_size, parallel = LAYOUTS[layout]
    for answer in pool.run(world_size, watch, recipe(parallel)):
        for count, waiting in zip(answer["buckets"], answer["sent"], strict=True):
            assert count >= 2 and len(waiting) == count
            assert waiting == sorted(waiting, reverse=True)
            assert waiting[0] > 0 and waiting[-1] == 0  # the first left long before the last gradient was there
        if answer["rounds"]:
            assert answer["left"][0] > 0  # nothing waits for all of them at the start of the pass
        assert answer["left"][-1] == 0
