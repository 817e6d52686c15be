"""Planned bytes of tensor, expert and pipeline parallelism equal what real processes send over the network."""

from dataclasses import replace

import pytest
import torch.distributed as dist

from moonlight.config.parallel import ParallelConfig
from moonlight.plan.collectives import dispatch_comm_bytes, expert_slices_comm_bytes, stage_comm_bytes
from tests.support.layouts import LAYOUTS, build, local_batches, recipe

MORE_LAYOUTS = {
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


def make_config(name, parallel):
    config = recipe(parallel, **RECIPES[name])
    model = {"moe_intermediate_size": 32, "hidden_size": 64, "q_lora_rank": 24 if name == "q_lora" else None}
    return replace(config, model=replace(config.model, **model))


def count_bytes(config):
    """Count what this rank sends and receives in one forward and backward pass over all micro-batches.

    Return (sent, received) bytes by group, and for each call of an MoE block's experts the token-expert pairs that
    this rank sent, received, and computed; then the number of micro-batches and the pipeline stage.
    """
    from megatron.core import parallel_state

    from moonlight.plan.comm_counter import CommCounter
    from moonlight.train.forward_backward import forward_backward

    model_chunks, optimizer = build(config)
    batches = local_batches(config, 0)
    optimizer.data_parallel.zero_grad_buffer()
    pairs = []
    rank = parallel_state.get_expert_model_parallel_rank()

    def record(dispatcher, *_):
        if dispatcher.input_splits is None:
            return
        sent, received = ([int(n) for n in splits] for splits in (dispatcher.input_splits, dispatcher.output_splits))
        pairs.append((sum(sent) - sent[rank], sum(received) - received[rank], sum(received)))

    for model in model_chunks:
        for layer in model.decoder.layers:
            if hasattr(layer.mlp, "token_dispatcher"):
                dispatcher = layer.mlp.token_dispatcher
                layer.mlp.experts.register_forward_pre_hook(lambda *_, d=dispatcher: record(d))
    with CommCounter() as counter:
        forward_backward(model_chunks, config, batches)
    groups = {
        "slices": parallel_state.get_tensor_model_parallel_group(),
        "dispatch": parallel_state.get_expert_model_parallel_group(),
        "expert slices": parallel_state.get_expert_tensor_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
    }
    group_bytes = {name: (counter.stats(group).sent, counter.stats(group).received) for name, group in groups.items()}
    # Tensor-parallel peers also sum the gradients of replicated parameters, which is not a layer's traffic.
    replicated = sum(
        gradient.numel() for p, _, gradient in optimizer.data_parallel.owned_shards() if p.tp_mode == "replicated"
    )
    ranks = config.parallel.tensor_parallel_size
    if groups["expert slices"].group_name == groups["slices"].group_name:
        group_bytes["expert slices"] = (0.0, 0.0)
    if config.parallel.virtual_pipeline_parallel_size > 1:  # Megatron uses the world group for one direction
        world = counter.stats(dist.group.WORLD)
        group_bytes["pipeline"] = tuple(
            a + b for a, b in zip(group_bytes["pipeline"], (world.sent, world.received), strict=True)
        )
    group_bytes["slices"] = tuple(count - 2 * (ranks - 1) / ranks * 4 * replicated for count in group_bytes["slices"])
    return group_bytes, pairs, len(batches), parallel_state.get_pipeline_model_parallel_rank()


def check(counts, flow):
    sent, received = counts
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
"""Layouts that `make test-slow` runs with every recipe; other layouts run only with float32 and bfloat16."""
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


def get_marks(layout, name):
    if (layout, name) in QUICK:
        return []
    return pytest.mark.slow if name in ("float32", "bfloat16") or layout in EVERY_RECIPE else pytest.mark.full


CASES = [pytest.param(layout, name, marks=get_marks(layout, name)) for layout in LAYOUT_NAMES for name in RECIPES]


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_bytes_of_real_processes(pool, layout, name):
    world_size, parallel = LAYOUTS.get(layout) or MORE_LAYOUTS[layout]
    config = make_config(name, parallel)
    answers = pool.run(world_size, count_bytes, config)
    for rank, (group_bytes, pairs, num_batches, stage) in enumerate(answers):
        planned = stage_comm_bytes(config, stage, num_batches)
        # A recomputed layer calls its experts twice and sends 1.5 times the bytes.
        scale = 0.75 if name == "layer again" else 1
        if parallel.expert_tensor_parallel_size > 1:
            size = parallel.expert_tensor_parallel_size
            peers = answers[rank // size * size :][:size]
            num_pairs = scale * sum(p[2] for _, of_peer, _, _ in peers for p in of_peer) / size
            group_bytes["slices"] = tuple(
                map(sum, zip(group_bytes["slices"], group_bytes["expert slices"], strict=True))
            )
            check(group_bytes["slices"], planned["slices"] + expert_slices_comm_bytes(config, num_pairs))
        elif parallel.tensor_parallel_size > 1:
            check(group_bytes["slices"], planned["slices"])
        if parallel.pipeline_parallel_size > 1:
            check(group_bytes["pipeline"], planned["pipeline"])
        if parallel.expert_parallel_size > 1:
            sent, received = scale * sum(p[0] for p in pairs), scale * sum(p[1] for p in pairs)
            check(group_bytes["dispatch"], dispatch_comm_bytes(config, sent + received))
            # The choices of an untrained router are nearly uniform.
            assert planned["dispatch"].sent == pytest.approx(group_bytes["dispatch"][0], rel=0.35)


@pytest.mark.parametrize("layout", ["EP2", "EP4", "EP2xTP2-4"])
def test_uniform_dispatch_is_exact_if_every_token_goes_to_every_expert(pool, layout):
    world_size, parallel = LAYOUTS.get(layout) or MORE_LAYOUTS[layout]
    config = make_config("float32", parallel)
    config = replace(config, model=replace(config.model, num_experts_per_tok=config.model.num_experts))
    for group_bytes, _, num_batches, stage in pool.run(world_size, count_bytes, config):
        check(group_bytes["dispatch"], stage_comm_bytes(config, stage, num_batches)["dispatch"])
