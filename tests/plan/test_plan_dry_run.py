"""Plans agree with dry runs of the real model and optimizer, and with the memory of real processes."""

import itertools
import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moonlight.config.load import load_recipe
from moonlight.plan.build import make_plan
from moonlight.plan.compare import PlanCheck, compare_with_dry_run
from moonlight.plan.cut import stage_parameters
from moonlight.plan.dry_run import META, MetaMemory, count_rank, fake_rank
from tests.support.layouts import LAYOUTS, build, recipe
from tests.support.suites import quick, slow

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs/quickstart.yaml"
BIG = ROOT / "configs/moonlight_16b_a3b/pretrain.yaml"

WORLDS = {
    "8, EP8": (8, 1, 8),
    "64, EP8": (64, 1, 8),
    "512, EP8": (512, 1, 8),
    "2048, EP8": (2048, 1, 8),
    "8, EP2 PP4": (8, 4, 2),
    "64, EP8 PP4": (64, 4, 8),
    "512, EP8 PP4": (512, 4, 8),
    "2048, EP8 PP4": (2048, 4, 8),
}
"""Name -> (processes, pipeline-parallel size, expert-parallel size)."""


def check_plan(config, world_size, rank):
    """Check the plan of one rank against a dry run."""
    plan = make_plan(config, world_size)
    rows = compare_with_dry_run(plan, rank, count_rank(config, world_size, rank))
    for row in rows:
        print(f"{world_size} rank {rank}: {row.name}: {row.planned:,.0f} {row.counted:,.0f} {row.difference:.3%}")
    by_name = {row.name: row for row in rows}
    # Tighter than the command's tolerance: these are exact counts.
    exact = [row for row in rows if row.tolerance is not None]
    assert not [row for row in exact if row.difference > 1e-9]
    assert by_name["exchange buffers"].difference < 1e-9
    # An upper bound, except for temporary small tensors.
    update = by_name["workspace of the update"]
    assert 0.93 * update.counted <= update.planned <= 1.6 * update.counted


@pytest.mark.parametrize("world", quick(WORLDS, "8, EP2 PP4", "64, EP8"))
def test_the_16b_plan_equals_a_dry_run(world):
    """The plan equals the dry run on the first rank, the last, and one in between."""
    world_size, stages, experts = WORLDS[world]
    config = load_recipe(BIG, [f"parallel.pipeline_parallel_size={stages}", f"parallel.expert_parallel_size={experts}"])
    for rank in (0, world_size // 2 - 3, world_size - 1):
        check_plan(config, world_size, rank)


@pytest.mark.parametrize(
    "overrides",
    [
        slow(("parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=4")),
        slow(("parallel.tensor_parallel_size=4", "parallel.expert_tensor_parallel_size=4")),
        ("parallel.tensor_parallel_size=2", "optimizer.matrices=per_head", "optimizer.momentum_dtype=bfloat16"),
        slow(("model.tie_word_embeddings=true", "parallel.pipeline_parallel_size=2", "optimizer.master_weights=split")),
        slow(("optimizer.name=adamw",)),
        slow(("parallel.tensor_parallel_size=2", "optimizer.gradient_dtype=bfloat16")),
        slow(("parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_parallel_size=2")),
    ],
)
def test_other_layouts_and_optimizers(overrides):
    config = load_recipe(BIG, ["parallel.expert_parallel_size=2", *overrides])
    for rank in (0, 13, 31):
        check_plan(config, 32, rank)


def memory_bytes(config):
    """Return this rank's bytes of weights, gradient sums, optimizer state and buffers in a real run."""
    model_chunks, optimizer = build(config)
    weights = [parameter for model in model_chunks for parameter in model.parameters()]
    return (
        sum(weight.numel() * weight.element_size() for weight in weights),
        sum(weight.main_grad.numel() * weight.main_grad.element_size() for weight in weights),
        optimizer.state_bytes(),
        sum(buffer.numel() * buffer.element_size() for model in model_chunks for buffer in model.buffers()),
    )


@pytest.mark.parametrize(
    ("layout", "dtype"),
    quick(
        itertools.product(
            ("1", "DP4", "TP2", "TP2-ETP2", "PP2-interleaved", "EP2xTP2-4", "EP2xTP2-ETP2-4", "EP2xPP2", "EP2xDP2"),
            ("float32", "bfloat16"),
        ),
        ("TP2", "float32"),
        ("PP2-interleaved", "bfloat16"),
        ("EP2xTP2-ETP2-4", "bfloat16"),
    ),
)
def test_memory_of_real_processes_equals_the_plan(pool, layout, dtype):
    world_size, parallel = LAYOUTS[layout]
    config = recipe(parallel, dtype=dtype, micro_batch_size=1)
    plan = make_plan(config, world_size)
    for rank, real in enumerate(pool.run(world_size, memory_bytes, config)):
        memory = plan.memories[rank]
        assert (memory.weights, memory.gradient_sums, memory.masters + memory.momenta, memory.buffers) == real


def test_a_tensor_outside_meta_is_an_error():
    with MetaMemory(), pytest.raises(AssertionError, match="a tensor of a dry run is on cpu"):
        torch.zeros(2)


def test_live_bytes_count_each_storage_once():
    with torch.device("meta"), MetaMemory() as memory:
        tensor = torch.zeros(10)
        with memory.measure_peak() as peak:
            view = tensor[2:]
            for _ in range(3):
                torch.ones(5) + 1
            del view
        assert memory.live == 40
        assert peak == [40]  # the operand and the sum


def test_models_are_on_meta_and_the_device_is_restored():
    before = torch.cuda.current_device()
    with fake_rank(recipe(), 1, 0) as model_chunks:
        assert torch.cuda.current_device() == META
        assert {parameter.device for model in model_chunks for parameter in model.parameters()} == {META}
    assert torch.cuda.current_device() == before


def test_differences_are_detected():
    assert not PlanCheck("parameters", 1000, 1001, 0.0).agrees
    assert PlanCheck("optimizer state", 1000, 1009, 0.01).agrees
    assert not PlanCheck("optimizer state", 1000, 1011, 0.01).agrees
    config = load_recipe(QUICKSTART)
    plan = make_plan(config, 2)
    counted = count_rank(config, 2, 1)
    assert all(row.agrees for row in compare_with_dry_run(plan, 1, counted))
    wrong = replace(counted, optimizer=int(counted.optimizer * 1.02), num_parameters=counted.num_parameters + 1)
    assert {row.name for row in compare_with_dry_run(plan, 1, wrong) if not row.agrees} == {
        "optimizer state",
        "parameters of the rank",
    }
    assert sum(p.numel for p in stage_parameters(config, 0)) == counted.num_parameters


def plan_command(*arguments):
    command = [sys.executable, "-m", "moonlight.cli", "plan", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_command_compares_plan_and_dry_run():
    process = plan_command(QUICKSTART, "--dry-run", "--rank", "1")
    assert process.returncode == 0 and not process.stderr
    assert "dry run of rank 1" in process.stdout and "the plan agrees with the dry run" in process.stdout
    content = json.loads(plan_command(QUICKSTART, "--dry-run", "--json").stdout)
    assert content["dry_run"]["agrees"] and content["dry_run"]["rank"] == 0
    rows = content["dry_run"]["figures"]
    assert rows["optimizer_state"]["planned"] == rows["optimizer_state"]["counted"] > 0


@pytest.mark.slow
def test_2048_processes_take_seconds_and_little_memory():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = plan_command(BIG, "--gpus", "2048", "--dry-run", "--rank", "2047")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0, process.stdout + process.stderr
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{seconds:.1f} s of CPU, at most {after.ru_maxrss / 1e6:.2f} GB")
    assert seconds < 60 and after.ru_maxrss < 4 * 2**20  # kB
