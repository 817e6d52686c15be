"""`moonlight plan`: which rule and which owner each parameter gets, and the recipe of Moonlight-16B-A3B."""

import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.core import parallel_state
from rich.console import Console

from moonlight import mapping
from moonlight.config_io import load_recipe
from moonlight.dry_run import dry_run
from moonlight.optim.routing import matrix_heights, route, rules_of
from moonlight.optim.shares import Share
from moonlight.plan import make_plan, of_world, print_plan, ranges, summary

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "configs/quickstart.yaml"
BIG = ROOT / "configs/moonlight_16b_a3b/pretrain.yaml"


def by_key(plan):
    return {line.key: line for line in plan.lines}


def test_the_16b_recipe_has_moonlights_parameters():
    run = load_recipe(BIG)
    rows = mapping.table(run.model)
    assert sum(math.prod(row.shape) for row in rows) == 15_960_110_208
    biases = [row for row in rows if row.parts[0].kind == "bias"]
    rules = route([row.key for row in rows if row not in biases], rules_of(run.optimizer, run.model))
    muon = {row.key: row.shape for row in rows if row.key in rules and rules[row.key].algorithm == "muon"}
    assert sum(len(matrix_heights(rules[key], shape)) for key, shape in muon.items()) == 5_207
    assert sum(map(math.prod, muon.values())) == 15_288_893_440
    # The paper's remainder counts the router biases too, which neither algorithm updates.
    assert sum(math.prod(row.shape) for row in rows if row.key not in muon) == 671_216_768
    assert sum(math.prod(row.shape) for row in biases) == 26 * 64


@pytest.mark.parametrize("settings", [(), ("parallel.pipeline_parallel_size=3", "parallel.tensor_parallel_size=2")])
def test_a_plan_of_16b_lists_everything_once(settings):
    run = load_recipe(BIG, ["parallel.expert_parallel_size=2", *settings])
    plan = make_plan(run, 24 if settings else 8)
    rows = mapping.table(run.model)
    trained = {row.key: row.shape for row in rows if row.parts[0].kind != "bias"}
    # The model holds experts as [experts, in, out], the other way round than checkpoints.
    trained |= {key: (shape[0], shape[2], shape[1]) for key, shape in trained.items() if ".mlp.experts." in key}
    assert sorted(line.key for line in plan.lines) == sorted(trained)
    assert {line.key: line.shape for line in plan.lines} == trained
    assert plan.num_matrices == 5_207
    assert plan.num_parameters("muon") == 15_288_893_440
    assert plan.num_parameters("adamw") + plan.num_router_biases == 671_216_768
    assert len(plan.ranks) == len(plan.adamw) == (24 if settings else 8)
    lines = by_key(plan)
    assert lines["decoder.layers.0.mlp.linear_fc1.weight"].matrices == {(11264, 2048): 2}
    assert lines["decoder.layers.26.mlp.experts.down_proj"].matrices == {(1408, 2048): 64}
    assert lines["decoder.layers.3.mlp.router.weight"].matrices == {(64, 2048): 1}
    assert lines["output_layer.weight"].matrices == {}
    assert all(line.decay for line in plan.lines)
    data_parallel_size = 4 if settings else 8
    assert {owner for line in plan.lines for owner in line.owners} == set(range(data_parallel_size))
    text = "\n".join(summary(plan))
    assert "15,960,110,208" in text and "5,207 matrices" in text
    assert "2,579,231,872, without the head 2,243,687,552" in text and "1.887e+10 FLOPs per token" in text


def test_heads_apart():
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
    assert {line.algorithm for line in plan.lines} == {"adamw"}
    # Rows of 128 elements cannot be dealt out quite evenly.
    for mine, zero in zip(plan.ranks, plan.adamw, strict=True):
        assert mine.state == pytest.approx(zero.state, rel=0.03)
        assert max(mine.sent, mine.received) == pytest.approx(zero.sent, rel=0.03)


@pytest.mark.parametrize("rank", [0, 5, 11, 14, 23])
def test_every_rank_gets_the_share_of_its_groups(rank):
    run = load_recipe(
        BIG,
        [
            "parallel.tensor_parallel_size=2",
            "parallel.pipeline_parallel_size=3",
            "parallel.expert_parallel_size=4",
            "parallel.expert_tensor_parallel_size=2",
        ],
    )
    dense, expert = [Share(d, 0, 0) for d in range(4)], [Share(0, e, 0) for e in range(1)]
    with dry_run(run, 24, rank):
        place = of_world(run, 24, (dense, expert))[rank % 8]
        assert place.sent == parallel_state.get_data_parallel_rank()
        assert place.received == parallel_state.get_expert_data_parallel_rank()


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
    done = run_plan(QUICKSTART, "--parameters", "--gpus", "4", "train.micro_batch_size=1")
    assert done.returncode == 0 and not done.stderr
    lines = done.stdout.splitlines()
    heads = [line.split() for line in lines]
    assert heads[0] == ["parameter", "shape", "rule", "decay", "matrices", "owner"]
    keys = {row.key for row in mapping.table(load_recipe(QUICKSTART).model) if row.parts[0].kind != "bias"}
    table = {words[0]: words for words in heads if words and words[0] in keys}
    assert table.keys() == keys
    assert table["embedding.word_embeddings.weight"][1:] == ["4096x128", "adamw", "yes", "0-3"]
    assert table["decoder.layers.2.mlp.experts.up_proj"][1:7] == ["8x128x96", "muon", "yes", "8", "of", "128x96"]
    assert max(map(len, lines[:-6])) <= 100
    assert lines[-5].startswith("parameters: ") and "AdamW" in lines[-1]


def test_without_parameters_only_the_summary():
    done = run_plan(QUICKSTART)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 6


def test_what_cannot_be_planned(refuses):
    refuses(["plan", QUICKSTART, "--gpus", "3"], "3 processes", "does not divide")
    refuses(["plan", QUICKSTART, "--gpus", "0"], "--gpus", "at least 1")
    refuses(["plan", QUICKSTART, "--gpus", "32"], "train.global_batch_size", "multiple of")
    refuses(["plan", ROOT / "missing.yaml"], "missing.yaml")
    refuses(["plan", QUICKSTART, "optimizer.nam=muon"], "optimizer.name")
