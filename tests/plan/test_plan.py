"""`moonlight plan`: the rule and owner of each parameter, and the plan of Moonlight-16B-A3B."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.core import parallel_state
from rich.console import Console

from moonlight.config.load import load_recipe
from moonlight.dist_checkpoint import hf_mapping
from moonlight.placement.comm_bytes import OptimizerCost
from moonlight.placement.param_groups import match_rules, param_group_rules, rows_per_matrix
from moonlight.plan.build import make_plan, stage_ranks
from moonlight.plan.dry_run import fake_rank
from moonlight.plan.flops import train_flops_per_token
from moonlight.plan.hardware import hardware_model
from moonlight.plan.owners import GroupCosts, GroupRankCost
from moonlight.plan.speed import bubble_fraction
from moonlight.plan.text import print_plan, ranges, summary

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs/quickstart.yaml"
BIG = ROOT / "configs/moonlight_16b_a3b/pretrain.yaml"


def by_key(plan):
    return {line.key: line for line in plan.params}


def test_the_16b_recipe_has_moonlights_parameters():
    config = load_recipe(BIG)
    rows = hf_mapping.tensor_mappings(config.model)
    assert sum(math.prod(row.shape) for row in rows) == 15_960_110_208
    biases = [row for row in rows if row.hf_tensors[0].init_kind == "bias"]
    rules = match_rules(
        [row.key for row in rows if row not in biases], param_group_rules(config.optimizer, config.model)
    )
    muon = {row.key: row.shape for row in rows if row.key in rules and rules[row.key].algorithm == "muon"}
    assert sum(len(rows_per_matrix(rules[key], shape)) for key, shape in muon.items()) == 5_207
    assert sum(map(math.prod, muon.values())) == 15_288_893_440
    # The paper's remainder includes the router biases, which neither algorithm updates.
    assert sum(math.prod(row.shape) for row in rows if row.key not in muon) == 671_216_768
    assert sum(math.prod(row.shape) for row in biases) == 26 * 64


@pytest.mark.parametrize("settings", [(), ("parallel.pipeline_parallel_size=3", "parallel.tensor_parallel_size=2")])
def test_a_plan_of_16b_lists_everything_once(settings):
    config = load_recipe(BIG, ["parallel.expert_parallel_size=2", *settings])
    plan = make_plan(config, 24 if settings else 8)
    rows = hf_mapping.tensor_mappings(config.model)
    trained = {row.key: row.shape for row in rows if row.hf_tensors[0].init_kind != "bias"}
    # The model stores experts as [experts, in, out]; checkpoints store them transposed.
    trained |= {key: (shape[0], shape[2], shape[1]) for key, shape in trained.items() if ".mlp.experts." in key}
    assert sorted(line.key for line in plan.params) == sorted(trained)
    assert {line.key: line.shape for line in plan.params} == trained
    assert plan.num_matrices == 5_207
    assert plan.num_parameters("muon") == 15_288_893_440
    assert plan.num_parameters("adamw") + plan.num_router_biases == 671_216_768
    assert len(plan.optimizer_costs) == len(plan.adamw) == (24 if settings else 8)
    lines = by_key(plan)
    assert lines["decoder.layers.0.mlp.linear_fc1.weight"].matrices == {(11264, 2048): 2}
    assert lines["decoder.layers.26.mlp.experts.down_proj"].matrices == {(1408, 2048): 64}
    assert lines["decoder.layers.3.mlp.router.weight"].matrices == {(64, 2048): 1}
    assert lines["output_layer.weight"].matrices == {}
    assert all(line.decay for line in plan.params)
    data_parallel_size = 4 if settings else 8
    assert {owner for line in plan.params for owner in line.owners} == set(range(data_parallel_size))
    text = "\n".join(summary(plan))
    assert "15,960,110,208" in text and "5,207 matrices" in text
    assert "2,579,231,872, without the head 2,243,687,552" in text and "1.887e+10 FLOPs per token" in text


def test_per_head_matrices():
    plan = make_plan(load_recipe(BIG, ["optimizer.matrices=per_head"]), 8)
    attention = "decoder.layers.5.self_attention"
    lines = by_key(plan)
    assert lines[f"{attention}.linear_q_proj.weight"].matrices == {(128, 2048): 16, (64, 2048): 16}
    assert lines[f"{attention}.linear_kv_up_proj.weight"].matrices == {(128, 512): 32}
    assert lines[f"{attention}.linear_proj.weight"].matrices == {(2048, 2048): 1}
    assert plan.num_matrices == 5_207 + 27 * (2 * 32 - 2)


def test_adamw_alone():
    plan = make_plan(load_recipe(QUICKSTART, ["optimizer.name=adamw", "train.micro_batch_size=1"]), 4)
    assert plan.num_matrices == 0
    assert {line.algorithm for line in plan.params} == {"adamw"}
    # Rows of 128 elements do not divide exactly evenly.
    for cost, zero in zip(plan.optimizer_costs, plan.adamw, strict=True):
        assert cost.state == pytest.approx(zero.state, rel=0.03)
        assert max(cost.sent, cost.received) == pytest.approx(zero.sent, rel=0.03)


@pytest.mark.parametrize("rank", [0, 5, 11, 14, 23])
def test_every_rank_gets_the_costs_of_its_groups(rank):
    config = load_recipe(
        BIG,
        [
            "parallel.tensor_parallel_size=2",
            "parallel.pipeline_parallel_size=3",
            "parallel.expert_parallel_size=4",
            "parallel.expert_tensor_parallel_size=2",
        ],
    )
    # Test costs: masters hold the data-parallel rank, momenta the tensor-parallel rank.
    dense, expert = (
        GroupCosts([[GroupRankCost(OptimizerCost(masters=d, momenta=t)) for t in range(2)] for d in range(size)], {})
        for size in (4, 1)
    )
    with fake_rank(config, 24, rank):
        costs = stage_ranks(config, 24, dense, expert)[rank % 8]
        assert costs.dense.optimizer_cost.masters == parallel_state.get_data_parallel_rank()
        assert costs.expert.optimizer_cost.masters == parallel_state.get_expert_data_parallel_rank()
        assert costs.dense.optimizer_cost.momenta == parallel_state.get_tensor_model_parallel_rank()
        assert costs.expert.optimizer_cost.momenta == parallel_state.get_expert_tensor_parallel_rank()


def test_ranges():
    assert ranges([3]) == "3"
    assert ranges([0, 2, 5]) == "0,2,5"
    assert ranges(list(range(8))) == "0-7"
    assert ranges([0, 1, 4, 5, 6, 9]) == "0-1,4-6,9"
    assert ranges([0, 3, 6, 9, 12, 15, 18, 21]) == "8 in 0-21"


def test_the_table_fits_a_terminal_of_100_columns():
    plan = make_plan(load_recipe(BIG, ["optimizer.matrices=per_head"]), 512)
    out = io.StringIO()
    print_plan(plan, parameters=True, console=Console(file=out, width=100, force_terminal=True, color_system=None))
    lines = out.getvalue().splitlines()
    table = lines[: lines.index("")]
    assert max(map(len, table)) <= 100
    names = [line.split()[0] for line in table if line.strip() and not line.startswith(" " * 20)]
    assert names.count("self_attention.linear_kv_down_proj.weight") == 27
    assert names.count("mlp.shared_experts.linear_fc1.weight") == 26
    assert "decoder.layers.26." in names


def run_plan(*arguments):
    command = [sys.executable, "-m", "moonlight.cli", "plan", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_command_prints_a_line_for_each_parameter():
    process = run_plan(QUICKSTART, "--parameters", "--gpus", "4", "train.micro_batch_size=1")
    assert process.returncode == 0 and not process.stderr
    lines = process.stdout.splitlines()
    heads = [line.split() for line in lines]
    assert heads[0] == ["parameter", "shape", "rule", "decay", "matrices", "owner"]
    keys = {
        row.key
        for row in hf_mapping.tensor_mappings(load_recipe(QUICKSTART).model)
        if row.hf_tensors[0].init_kind != "bias"
    }
    table = {words[0]: words for words in heads if words and words[0] in keys}
    assert table.keys() == keys
    assert table["embedding.word_embeddings.weight"][1:] == ["4096x128", "adamw", "yes", "0-3"]
    assert table["decoder.layers.2.mlp.experts.up_proj"][1:7] == ["8x128x96", "muon", "yes", "8", "of", "128x96"]
    first = lines.index(next(line for line in lines if line.startswith("quickstart on 4")))
    assert max(map(len, lines[:first])) <= 100
    assert lines[first + 2].startswith("parameters: ") and "AdamW" in lines[first + 7]


def test_without_parameters_only_the_tables():
    process = run_plan(QUICKSTART)
    assert process.returncode == 0 and "decoder.layers" not in process.stdout
    for heading in ("memory of a rank", "network bytes", "seconds of a step"):
        assert heading in process.stdout


def test_the_command_imports_no_torch():
    code = (
        "import sys; from moonlight.cli.main import main\n"
        "sys.argv = ['moonlight', 'plan', sys.argv[1], '--gpus', '512']\n"
        "try: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(BIG)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 0 and process.stderr == "False\n"


def test_json_has_the_values_of_the_plan():
    process = run_plan(BIG, "--gpus", "64", "--json")
    content = json.loads(process.stdout)
    plan = make_plan(load_recipe(BIG), 64)
    assert content["parameters"]["total"] == 15_960_110_208
    assert content["memory"]["fullest"]["peak_bytes"] == plan.memories[plan.peak_rank].peak
    assert content["step_seconds"]["total"] == pytest.approx(plan.seconds.total)
    assert content["checkpoint"]["bytes"] == plan.checkpoint_bytes


@pytest.mark.parametrize(
    ("recipe", "settings", "gpus"),
    [
        (path, ("train.train_steps=1000",) if path.parent.name == "sft" else (), None)
        for path in sorted((ROOT / "configs").rglob("*.yaml"))
        if path.parent.name not in ("scaling", "ablations")
    ]
    + [(BIG, (), gpus) for gpus in (8, 64, 512, 2048)]
    + [(BIG, ("parallel.pipeline_parallel_size=4", "parallel.expert_parallel_size=1"), 256)]
    + [(BIG, ("model.first_k_dense_replace=27", "parallel.expert_parallel_size=1"), 64)],
)
def test_every_recipe_can_be_planned(recipe, settings, gpus):
    config = load_recipe(recipe, settings)
    plan = make_plan(config, gpus or config.parallel.num_processes)
    out = io.StringIO()
    print_plan(plan, parameters=False, console=Console(file=out, width=100, force_terminal=True, color_system=None))
    assert max(map(len, out.getvalue().splitlines())) <= 100
    assert plan.seconds.total > 0 and plan.total_seconds > 0
    assert sum(stage.flops for stage in plan.stages) * plan.world_size / len(plan.stages) == pytest.approx(
        train_flops_per_token(config.model, config.data.sequence_length) * plan.tokens_per_step
    )


def test_a_plan_states_if_it_does_not_fit():
    process = run_plan(BIG, "--gpus", "8", "--gpu", "a100", "train.micro_batch_size=2")
    assert process.returncode == 0
    assert "DOES NOT FIT: the most loaded rank needs " in process.stdout
    assert "more than the 84.93 GB of a GPU" in process.stdout
    process = run_plan(BIG, "--gpus", "8", "--gpu-memory", "2000")
    assert "\nfits: the most loaded rank needs " in process.stdout and " of 2,000.00 GB" in process.stdout


def test_recomputation_adds_flops_and_time():
    """Recomputing a layer adds its forward pass, a third of its FLOPs; mla_up_proj adds only the up-projections."""
    plain, latents, layers = (
        make_plan(load_recipe(BIG, [f"train.recompute_modules=[{names}]"]), 64)
        for names in ("layernorm,mlp_act", "mla_up_proj", "layer")
    )
    tokens = plain.tokens_per_step / plain.world_size
    head = 6 * 2048 * 163840 + 6 * 2048  # head and final norm
    (stage,) = plain.stages
    assert stage.recomputed_flops == 0
    assert latents.stages[0].recomputed_flops == tokens * 27 * 2 * 16 * (192 * 2048 + 256 * 512)
    assert layers.stages[0].recomputed_flops == pytest.approx((stage.flops - tokens * head) / 3)
    assert {p.stages[0].flops for p in (latents, layers)} == {stage.flops}
    assert plain.seconds.arithmetic < latents.seconds.arithmetic < layers.seconds.arithmetic
    assert layers.seconds.dispatch == pytest.approx(1.5 * plain.seconds.dispatch)


def test_step_time_follows_from_efficiency_and_bubble():
    config = load_recipe(BIG, ["parallel.pipeline_parallel_size=4", "parallel.expert_parallel_size=2"])
    half, full = (make_plan(config, 64, hardware_model(efficiency=efficiency)) for efficiency in (0.25, 0.5))
    assert half.seconds.arithmetic == pytest.approx(2 * full.seconds.arithmetic)
    slowest = max(stage.flops for stage in full.stages)
    assert full.seconds.arithmetic == pytest.approx(slowest / (0.5 * 989e12))
    # Each of 16 data-parallel ranks has 256 micro-batches of a batch of 4,096 sequences.
    assert bubble_fraction(config, 256) == 3 / (256 + 3)
    busy = full.seconds.arithmetic + full.seconds.dispatch + full.seconds.slices
    assert full.seconds.bubble / (busy + full.seconds.bubble) == pytest.approx(3 / 259)
    counts = full.timeline.steps_by_batch_size()
    assert counts == {2048: 11_921, 4096: 163_913} and full.global_batch_size == 4096


def test_invalid_options_are_refused(refuses):
    refuses(["plan", QUICKSTART, "--rank", "1"], "--rank is 1", "--dry-run")
    refuses(["plan", QUICKSTART, "--dry-run", "--rank", "2"], "--rank is 2", "0 to 1")
    refuses(["plan", QUICKSTART, "--dry-run", "--rank", "-1"], "--rank is -1", "0 to 1")
    refuses(["plan", QUICKSTART, "--gpu", "tpu"], "--gpu is 'tpu'", "h100, h800, h200, a100, b200")
    for value in ("0", "1.01", "-1", "nan"):
        refuses(["plan", QUICKSTART, "--efficiency", value], "--efficiency is", "greater than 0 and at most 1")
    refuses(["plan", QUICKSTART, "--gpu-memory", "0"], "--gpu-memory is 0.0", "greater than 0")
    refuses(["plan", QUICKSTART, "--storage-gb-per-second", "-1"], "--storage-gb-per-second is -1.0", "greater than 0")
    refuses(["plan", QUICKSTART, "--suggest", "--dry-run"], "--suggest and --dry-run")
    refuses(["plan", QUICKSTART, "--suggest", "--parameters"], "--suggest and --parameters")
    refuses(["plan", QUICKSTART, "--json", "--parameters"], "--json and --parameters")
    refuses(["plan", QUICKSTART, "--gpus", "3"], "3 processes", "does not divide")
    refuses(["plan", QUICKSTART, "--gpus", "0"], "--gpus", "at least 1")
    refuses(["plan", QUICKSTART, "--gpus", "32"], "train.global_batch_size", "multiple of")
    refuses(["plan", ROOT / "missing.yaml"], "missing.yaml")
    refuses(["plan", QUICKSTART, "optimizer.nam=muon"], "optimizer.name")
