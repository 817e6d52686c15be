"""Parameters that a plan derives from the recipe equal those of the real model."""

import itertools
from dataclasses import replace

import pytest

from moonlight.config.parallel import ParallelConfig
from moonlight.dist_checkpoint import hf_mapping
from moonlight.model.shards import collect_sharded_tensors, local_shards
from moonlight.optim.parameters import collect_params
from moonlight.placement.param_groups import param_group_rules
from moonlight.plan.cut import stage_parameters
from moonlight.plan.dry_run import fake_rank
from tests.support.layouts import recipe
from tests.support.suites import quick

LAYOUTS = {
    "1": (1, ParallelConfig()),
    "DP4": (4, ParallelConfig()),
    "TP2": (2, ParallelConfig(tensor_parallel_size=2)),
    "TP4-EP2": (8, ParallelConfig(tensor_parallel_size=4, expert_parallel_size=2)),
    "TP2-ETP2-EP4": (8, ParallelConfig(tensor_parallel_size=2, expert_tensor_parallel_size=2, expert_parallel_size=4)),
    "PP4": (4, ParallelConfig(pipeline_parallel_size=4)),
    "PP2-VPP2-TP2": (
        4,
        ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_parallel_size=2, tensor_parallel_size=2),
    ),
    "PP5": (5, ParallelConfig(pipeline_parallel_size=5)),
    "EP8-PP2": (16, ParallelConfig(expert_parallel_size=8, pipeline_parallel_size=2)),
}
MODELS = {
    "plain": ({}, {}),
    "q_lora, tied": ({"q_lora_rank": 24, "tie_word_embeddings": True}, {}),
    "per head": ({}, {"matrices": "per_head"}),
    "adamw, tied": ({"tie_word_embeddings": True}, {"name": "adamw"}),
}


@pytest.mark.parametrize(
    ("layout", "name"),
    quick(
        itertools.product(LAYOUTS, MODELS),
        ("DP4", "plain"),
        ("TP2", "per head"),
        ("PP4", "q_lora, tied"),
        ("TP2-ETP2-EP4", "adamw, tied"),
        ("PP2-VPP2-TP2", "q_lora, tied"),
        ("EP8-PP2", "plain"),
    ),
)
def test_planned_parameters_equal_the_models(layout, name):
    world_size, parallel = LAYOUTS[layout]
    model_changes, optimizer_changes = MODELS[name]
    config = recipe(parallel)
    config = replace(
        config, model=replace(config.model, **model_changes), optimizer=replace(config.optimizer, **optimizer_changes)
    )
    stages = parallel.pipeline_parallel_size
    keys = set()
    for stage in range(stages):
        with fake_rank(config, world_size, stage * world_size // stages) as model_chunks:
            real = collect_params(
                collect_sharded_tensors(model_chunks), param_group_rules(config.optimizer, config.model)
            )
            planned = stage_parameters(config, stage)
            assert [p.key for p in planned] == [p.key for p in real]
            for plan_param, param in zip(planned, real, strict=True):
                assert plan_param.spec == param.spec, plan_param.key
                assert plan_param.global_shape == tuple(local_shards(param.sharded_param)[0].global_shape)
                for attribute in ("rule", "tp_mode", "tp_dim", "is_expert", "is_embedding_replica"):
                    assert getattr(plan_param, attribute) == getattr(param, attribute), (plan_param.key, attribute)
            keys |= {p.key for p in planned}
    assert keys == {
        row.key for row in hf_mapping.tensor_mappings(config.model) if row.hf_tensors[0].init_kind != "bias"
    }
