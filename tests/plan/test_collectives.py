"""The planned bytes of tensor, expert and pipeline parallelism against what real processes put on the wire."""

from dataclasses import replace

import pytest
import torch.distributed as dist

from moonlight.config.parallel import ParallelConfig
from moonlight.plan.collectives import DispatchedPairs, dispatch_comm_bytes, expert_slices_comm_bytes, stage_comm_bytes
from tests.support.layouts import LAYOUTS, build, local_batches, recipe

MORE = {
    "TP2xPP2": (4, ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2)),
    "TP4": (4, ParallelConfig(tensor_parallel_size=4)),
    "EP4": (4, ParallelConfig(expert_parallel_size=4)),
    "PP4": (4, ParallelConfig(pipeline_parallel_size=4)),
}
RECIPES = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float32 residual": {"dtype": "bfloat16", "fp32_residual_connection": True},
    "q_lora": {},
    "mla_up_proj again": {"recompute_modules": ("mla_up_proj",)},
    "layer again": {"recompute_modules": ("layer",)},
}


def run_of(name, parallel):
    run = recipe(parallel, **RECIPES[name])
    model = {"moe_intermediate_size": 32, "hidden_size": 64, "q_lora_rank": 24 if name == "q_lora" else None}
    return replace(run, model=replace(run.model, **model))


def counted(run):
    """Of this rank: (sent, received) by group of one forward and backward pass, and for each of its mixtures the
    token-expert pairs that left and came, over all micro-batches, and those its experts got."""
    from megatron.core import parallel_state

    from moonlight.plan.comm_counter import CommCounter
    from moonlight.train.forward_backward import forward_backward

    models, optimizer = build(run)
    batches = local_batches(run, 0)
    optimizer.data_parallel.zero_grad_buffer()
    pairs = []
    me = parallel_state.get_expert_model_parallel_rank()

    def see(dispatcher, *_):
        if dispatcher.input_splits is None:
            return
        sent, received = ([int(n) for n in splits] for splits in (dispatcher.input_splits, dispatcher.output_splits))
        pairs.append((sum(sent) - sent[me], sum(received) - received[me], sum(received)))

    for model in models:
        for layer in model.decoder.layers:
            if hasattr(layer.mlp, "token_dispatcher"):
                dispatcher = layer.mlp.token_dispatcher
                layer.mlp.experts.register_forward_pre_hook(lambda *_, d=dispatcher: see(d))
    with CommCounter() as counter:
        forward_backward(models, run, batches)
    groups = {
        "slices": parallel_state.get_tensor_model_parallel_group(),
        "dispatch": parallel_state.get_expert_model_parallel_group(),
        "expert slices": parallel_state.get_expert_tensor_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
    }
    found = {name: (counter.stats(group).sent, counter.stats(group).received) for name, group in groups.items()}
    # Not the layers' own: peers add up the gradients of what all of them hold.
    replicated = sum(
        gradient.numel() for p, _, gradient in optimizer.data_parallel.owned_shards() if p.tp_mode == "replicated"
    )
    ranks = run.parallel.tensor_parallel_size
    if groups["expert slices"].group_name == groups["slices"].group_name:
        found["expert slices"] = (0.0, 0.0)
    if run.parallel.virtual_pipeline_parallel_size > 1:  # where Megatron takes the whole world for one direction
        world = counter.stats(dist.group.WORLD)
        found["pipeline"] = tuple(a + b for a, b in zip(found["pipeline"], (world.sent, world.received), strict=True))
    found["slices"] = tuple(count - 2 * (ranks - 1) / ranks * 4 * replicated for count in found["slices"])
    return found, pairs, len(batches), parallel_state.get_pipeline_model_parallel_rank()


def check(counted, flow):
    sent, received = counted
    print(sent, flow.sent, flow.sent / sent)
    assert flow.sent == pytest.approx(sent, rel=1e-3)
    assert flow.received == pytest.approx(received, rel=1e-3)


LAYOUT_NAMES = (
    "TP2",
    "TP2-ETP2",
    "TP4",
    "EP2",
    "EP4",
    "EP2xTP2-4",
    "EP2xTP2-ETP2-4",
    "PP2",
    "PP4",
    "PP2-interleaved",
    "TP2xPP2",
    "EP2xPP2",
)
EVERY_RECIPE = ("TP2", "EP2xTP2-ETP2-4", "PP2")
"""Layouts that `make test-slow` tries with every recipe; the others with the two plain ones."""
QUICK = {
    ("TP4", "bfloat16"),
    ("EP4", "float32"),
    ("PP2", "float32"),
    ("PP2-interleaved", "bfloat16"),
    ("TP2xPP2", "float32"),
    ("EP2xTP2-ETP2-4", "float32"),
    ("EP2xTP2-ETP2-4", "float32 residual"),
    ("EP2xTP2-ETP2-4", "layer again"),
    ("TP2", "q_lora"),
    ("TP2", "mla_up_proj again"),
}


def marks_of(layout, name):
    if (layout, name) in QUICK:
        return []
    return pytest.mark.slow if name in ("float32", "bfloat16") or layout in EVERY_RECIPE else pytest.mark.full


CASES = [pytest.param(layout, name, marks=marks_of(layout, name)) for layout in LAYOUT_NAMES for name in RECIPES]


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_what_real_processes_send(pool, layout, name):
    world_size, parallel = LAYOUTS.get(layout) or MORE[layout]
    run = run_of(name, parallel)
    answers = pool.run(world_size, counted, run)
    for rank, (found, pairs, num_batches, stage) in enumerate(answers):
        planned = stage_comm_bytes(run, stage, num_batches)
        # Experts are entered twice in a layer that is made again, and sent to one and a half times.
        seen = 0.75 if name == "layer again" else 1
        if parallel.expert_tensor_parallel_size > 1:
            size = parallel.expert_tensor_parallel_size
            peers = answers[rank // size * size :][:size]
            came = seen * sum(p[2] for _, of_peer, _, _ in peers for p in of_peer) / size
            found["slices"] = tuple(map(sum, zip(found["slices"], found["expert slices"], strict=True)))
            check(found["slices"], planned["slices"] + expert_slices_comm_bytes(run, came))
        elif parallel.tensor_parallel_size > 1:
            check(found["slices"], planned["slices"])
        if parallel.pipeline_parallel_size > 1:
            check(found["pipeline"], planned["pipeline"])
        if parallel.expert_parallel_size > 1:
            sent, received = seen * sum(p[0] for p in pairs), seen * sum(p[1] for p in pairs)
            check(found["dispatch"], dispatch_comm_bytes(run, DispatchedPairs(sent, received)))
            # What an untrained router chooses is near to uniform.
            assert planned["dispatch"].sent == pytest.approx(found["dispatch"][0], rel=0.35)


@pytest.mark.parametrize("layout", ["EP2", "EP4", "EP2xTP2-4"])
def test_uniform_dispatch_is_exact_where_every_token_goes_to_every_expert(pool, layout):
    world_size, parallel = LAYOUTS.get(layout) or MORE[layout]
    run = run_of("float32", parallel)
    run = replace(run, model=replace(run.model, num_experts_per_tok=run.model.num_experts))
    for found, _, num_batches, stage in pool.run(world_size, counted, run):
        check(found["dispatch"], stage_comm_bytes(run, stage, num_batches)["dispatch"])
