"""The parameters that a plan cuts from the recipe against those of the model that is built."""

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
def test_parameters_are_the_models(layout, name):
    world_size, parallel = LAYOUTS[layout]
    model, optimizer = MODELS[name]
    run = recipe(parallel)
    run = replace(run, model=replace(run.model, **model), optimizer=replace(run.optimizer, **optimizer))
    stages = parallel.pipeline_parallel_size
    seen = set()
    for stage in range(stages):
        with fake_rank(run, world_size, stage * world_size // stages) as models:
            real = collect_params(collect_sharded_tensors(models), param_group_rules(run.optimizer, run.model))
            planned = stage_parameters(run, stage)
            assert [p.key for p in planned] == [p.key for p in real]
            for mine, parameter in zip(planned, real, strict=True):
                assert mine.spec == parameter.spec, mine.key
                assert mine.global_shape == tuple(local_shards(parameter.sharded_param)[0].global_shape)
                for attribute in ("rule", "tp_mode", "tp_dim", "is_expert", "is_embedding_replica"):
                    assert getattr(mine, attribute) == getattr(parameter, attribute), (mine.key, attribute)
            seen |= {p.key for p in planned}
    assert seen == {row.key for row in hf_mapping.tensor_mappings(run.model) if row.hf_tensors[0].init_kind != "bias"}
