"""Gradient reduction must overlap the backward pass, and weight gathering the next forward pass."""

from typing import Any

import pytest

from moonlight.config.run import RunConfig
from tests.support.layouts import LAYOUTS, build, one_step, recipe
from tests.support.suites import quick


def record_overlap(config: RunConfig) -> dict[str, Any]:
    """Run two steps and record the overlap in the second.

    "sent" has, for each bucket of each group, the number of missing gradients when its reduce-scatter started.
    "left" has the number of weight rounds not yet gathered before each module of the forward pass.
    """
    model_chunks, optimizer = build(config)
    groups = optimizer.data_parallel.bucket_groups
    sent: list[list[int]] = [[] for _ in groups]
    left: list[int] = []
    one_step(model_chunks, optimizer, config, 2)  # step 1 is monitored and would wait for all weights

    for group, log in zip(groups, sent, strict=True):

        def reduce_next(group=group, log=log, original=group._start_next_reduce_scatter):
            log.append(sum(map(len, group._missing_grads)))
            original()

        group._start_next_reduce_scatter = reduce_next

    def record_left(*_: Any) -> None:
        left.append(sum(len(group._to_gather) + len(group._in_flight) for group in groups))

    handles = [module.register_forward_pre_hook(record_left) for model in model_chunks for module in model.modules()]
    one_step(model_chunks, optimizer, config, 3)
    for handle in handles:
        handle.remove()
    rounds = sum(len(bucket.rounds) for group in groups for bucket in group.buckets)
    return {"sent": sent, "left": left, "rounds": rounds, "buckets": [len(group.buckets) for group in groups]}


@pytest.mark.parametrize("layout", quick(["DP2", "EP2xDP2", "EP2xPP2", "EP2xTP2-4"], "DP2", "EP2xPP2", "EP2xTP2-4"))
def test_communication_overlaps_computation(pool, layout):
    world_size, parallel = LAYOUTS[layout]
    for answer in pool.run(world_size, record_overlap, recipe(parallel)):
        for count, waiting in zip(answer["buckets"], answer["sent"], strict=True):
            assert count >= 2 and len(waiting) == count
            assert waiting == sorted(waiting, reverse=True)
            assert waiting[0] > 0 and waiting[-1] == 0  # the first bucket was sent before the last gradient was ready
        if answer["rounds"]:
            assert answer["left"][0] > 0  # the pass starts before all weights are gathered
        assert answer["left"][-1] == 0
