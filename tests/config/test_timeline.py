"""Run schedules: the paper's own must have its values, and any other must equal a loop over every step."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moonlight.config.load import load_recipe, parse_run_config
from moonlight.config.timeline import RunSchedule
from moonlight.errors import UserError
from moonlight.train.metrics import read_metrics
from tests.support.layouts import train_run

ROOT = Path(__file__).parents[2]
BIG = ROOT / "configs/moonlight_16b_a3b/pretrain.yaml"
MODEL = {
    "vocab_size": 8,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def test_the_schedule_of_the_paper():
    schedule = RunSchedule(load_recipe(BIG))
    at, tokens = schedule.at, 8192

    assert at(1).learning_rate == pytest.approx(4.2e-4 / 2000)
    assert at(2000).learning_rate == 4.2e-4 and at(2000).stage == "warmup" and at(2001).stage == "cosine"
    assert at(2000).end * tokens == 33_554_432_000
    # Step 11,921 reaches 200B tokens, and the batch doubles from the next step.
    assert at(11_921).global_batch_size == 2048 and at(11_922).global_batch_size == 4096
    assert at(11_921).end * tokens >= 200e9 > at(11_920).end * tokens
    end = max(step for step in range(150_000, 165_000) if at(step).stage == "cosine")
    assert at(end).end * tokens == pytest.approx(5.2e12, rel=1e-5)
    assert at(end).learning_rate == pytest.approx(4.2e-5) and at(end).router_bias_update_rate == 1e-3
    # The last step of a stage exceeds its end by less than a step.
    assert at(end + 100).learning_rate == pytest.approx(1e-4, rel=0.01)
    assert at(end + 101).learning_rate <= 1e-4 and at(end + 1).router_bias_update_rate == 0
    assert at(schedule.num_steps).learning_rate == 0.0 and at(schedule.num_steps).stage == "cooldown"
    assert at(schedule.num_steps).end * tokens == pytest.approx(5.7e12, rel=1e-5)
    half = at(end).learning_rate + (4.2e-4 - 4.2e-5) / 2
    middle = min(range(2001, end), key=lambda step: abs(at(step).end * tokens - (33_554_432_000 + 5.2e12) / 2))
    assert at(middle).learning_rate == pytest.approx(half, rel=1e-4)


def test_a_single_stage_has_the_same_steps_as_in_the_full_run():
    full, single = RunSchedule(load_recipe(BIG)), RunSchedule(load_recipe(BIG, ["train.only_stage=cooldown"]))
    assert single.first_sequence == -(-5_200_000_000_000 // 8192)
    offset = max(step for step in range(150_000, 165_000) if full.at(step).stage == "cosine")
    for step in (1, 50, 100, 101, 5000, 14_000):
        values, expected = single.at(step), full.at(step + offset)
        assert values.stage == expected.stage and values.global_batch_size == expected.global_batch_size == 4096
        # The values differ by what the previous stage exceeded its end.
        assert values.learning_rate == pytest.approx(expected.learning_rate, rel=0.03, abs=1e-8)


@st.composite
def recipes(draw):
    length = draw(st.integers(1, 7))
    stages, end = {}, 0
    for index in range(draw(st.integers(1, 4))):
        start, end = end, end + draw(st.integers(300, 3000))
        lr = draw(st.floats(0.1, 1.0))
        stages[f"s{index}"] = {
            "from_tokens": start,
            "to_tokens": end,
            "lr": lr,
            "min_lr": lr * draw(st.floats(0, 1)),
            "decay": draw(st.sampled_from(["cosine", "linear", "constant"])),
            "warmup_steps": draw(st.integers(0, 3)),
        }
    growth, size = [], draw(st.integers(1, 5))
    train = {"global_batch_size": size, "micro_batch_size": 1}
    tokens = 0
    for _ in range(draw(st.integers(0, 2))):
        tokens, size = tokens + draw(st.integers(1, 2000)), size + draw(st.integers(1, 5))
        growth.append({"after_tokens": tokens, "global_batch_size": size})
    train["batch_growth"] = growth
    data = {"path": "data", "tokenizer": "tokenizer", "sequence_length": length}
    return parse_run_config({"name": "any", "model": MODEL, "data": data, "stages": stages, "train": train})


@settings(max_examples=300, deadline=None)
@given(config=recipes())
def test_any_schedule_equals_a_loop_over_its_steps(config):
    schedule, length = RunSchedule(config), config.data.sequence_length
    step, consumed, before = 0, 0, 0.0
    for name, stage in config.stages.items():
        sizes = [config.train.global_batch_size]
        sizes += [g.global_batch_size for g in config.train.batch_growth if stage.from_tokens >= g.after_tokens]
        warmup = stage.warmup_steps * sizes[-1] * length
        while consumed * length < stage.to_tokens:
            step += 1
            size = config.train.global_batch_size
            for change in config.train.batch_growth:
                if consumed * length >= change.after_tokens:
                    size = change.global_batch_size
            values = schedule.at(step)
            assert (values.stage, values.first_sequence, values.global_batch_size) == (name, consumed, size)
            consumed += size
            done = min(consumed * length, stage.to_tokens) - stage.from_tokens
            if done < warmup:
                expected = before + (stage.lr - before) * done / warmup
            else:
                fraction = (done - warmup) / max(1, stage.to_tokens - stage.from_tokens - warmup)
                factor = {"constant": 1.0, "linear": 1 - fraction, "cosine": (1 + math.cos(math.pi * fraction)) / 2}[
                    stage.decay
                ]
                expected = stage.end_lr + (stage.lr - stage.end_lr) * factor
            assert values.learning_rate == pytest.approx(expected, abs=1e-12)
        before = stage.end_lr
    assert schedule.num_steps == step and schedule.num_sequences == consumed


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["stages.cosine.from_tokens=1000"],
            "stages.cosine.from_tokens is 1000, which overlaps: stages.warmup ends at",
        ),
        (["stages.cooldown.from_tokens=5300000000000"], "leaves a gap: stages.cosine ends at 5200000000000 tokens"),
        (["stages.warmup.from_tokens=5"], "the first stage begins at 0 tokens"),
        (["stages.cooldown.to_tokens=7"], "it must be greater than stages.cooldown.from_tokens"),
        (["stages.warmup.warmup_steps=3000"], "stages.warmup.warmup_steps is 3000"),
        (["train.train_steps=5"], "leave it out, because stages end at a number"),
        (["schedule.lr=1.0"], "schedule and stages are both given"),
        (["train.only_stage=warm"], "train.only_stage is 'warm': the stages are warmup, cosine, cooldown"),
        (["train.batch_growth=[{after_tokens: 5, global_batch_size: 8}]"], "it must be greater than 2048"),
        (["data.sources.web.weight=-1"], "data.sources.web.weight is -1.0: it must be at least 0"),
        (["stages.cooldown.weights={web: 0, code: 0, math: 0}"], "stages.cooldown.weights: all weights are 0"),
        (["stages.cooldown.weights.poems=1"], "stages.cooldown.weights names poems: the sources are web, code, math"),
        (["data.path=data"], "data.path and data.sources are both given"),
        (["stages.cooldown.ende=7"], "unknown recipe key stages.cooldown.ende"),
        (["stages=[1]"], "override 'stages=[1]'"),
        (["train.batch_growth=3"], "train.batch_growth is 3: a list is expected"),
    ],
)
def test_an_invalid_schedule_is_refused(overrides, words):
    with pytest.raises(UserError) as caught:
        load_recipe(BIG, overrides)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.stop_at_step=200000"], "train.stop_at_step is 200000: at most 175834, the steps"),
        (["stages.warmup.to_tokens=5", "stages.warmup.warmup_steps=0", "stages.cosine.from_tokens=5"], None),
        (["data.sequence_length=1", "train.global_batch_size=1", "train.batch_growth=[]"], "at most 99999999"),
    ],
)
def test_an_invalid_number_of_steps_is_refused(overrides, words):
    config = load_recipe(BIG, overrides)
    if words is None:
        with pytest.raises(UserError, match=r"train\.only_stage is 'cosine': no step begins in it"):
            end = "stages.cosine.to_tokens=6"
            RunSchedule(load_recipe(BIG, [*overrides, end, "stages.cooldown.from_tokens=6", "train.only_stage=cosine"]))
    else:
        with pytest.raises(UserError, match=words):
            RunSchedule(config)


def test_every_batch_size_of_the_growth_must_be_divisible():
    config = load_recipe(BIG, ["train.batch_growth=[{after_tokens: 5, global_batch_size: 4100}]"])
    with pytest.raises(UserError, match=r"train.batch_growth\[0\].global_batch_size is 4100: it must be a multiple of"):
        config.check_batches(8)


def golden():
    with (Path(__file__).parents[1] / "golden/rehearsal.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_rehearsal_keeps_its_schedule_and_the_proportions_of_the_paper():
    config, paper = load_recipe(ROOT / "configs/rehearsal.yaml"), load_recipe(BIG)
    schedule = RunSchedule(config)
    assert schedule.num_steps == 1500
    for row in golden():
        values = schedule.at(int(row["step"]))
        assert values.stage == row["stage"]
        assert values.end * config.data.sequence_length == int(row["consumed_tokens"])
        assert values.global_batch_size == int(row["global_batch_size"])
        assert values.learning_rate == pytest.approx(float(row["learning_rate"]), rel=1e-9, abs=1e-15)
        assert values.router_bias_update_rate == float(row["router_bias_update_rate"])

    def proportions(recipe):
        end, peak = recipe.stages["cooldown"].to_tokens, recipe.stages["warmup"].lr
        return [
            *(stage.to_tokens / end for stage in recipe.stages.values()),
            *(change.after_tokens / end for change in recipe.train.batch_growth),
            *(stage.lr / peak for stage in recipe.stages.values()),
            *(stage.end_lr / peak for stage in recipe.stages.values()),
            recipe.train.batch_growth[0].global_batch_size / recipe.train.global_batch_size,
        ]

    # Warmup and batch growth end with a full step, which is up to 1% of their tokens.
    assert proportions(config) == pytest.approx(proportions(paper), rel=0.01)


@pytest.mark.full
def test_a_run_of_the_rehearsal_follows_its_schedule(pool, tiny_run, tmp_path):
    """A smaller model on two processes must follow the schedule in all 1,500 steps."""
    tiny, config = load_recipe(tiny_run.recipe), load_recipe(ROOT / "configs/rehearsal.yaml")
    data = replace(tiny.data, sequence_length=config.data.sequence_length)
    model_config = replace(tiny.model, max_position_embeddings=config.model.max_position_embeddings)
    train_config = replace(config.train, validate_every_steps=1500, save_every_steps=500)
    config = replace(config, model=model_config, data=data, train=train_config, runs_folder=str(tmp_path))
    pool.run(2, train_run, config)
    check_schedule(tmp_path / config.name)


def check_schedule(folder):
    """Check the metrics of a run against the golden schedule."""
    entries = {entry["step"]: entry for entry in read_metrics(folder)}
    assert len(entries) == 1500
    for row in golden():
        entry = entries[int(row["step"])]
        assert entry["stage"] == row["stage"] and entry["consumed_tokens"] == int(row["consumed_tokens"])
        assert entry["optim/global_batch_size"] == int(row["global_batch_size"])
        assert entry["optim/lr"] == pytest.approx(float(row["learning_rate"]), rel=1e-9, abs=1e-15)
        assert entry["optim/router_bias_update_rate"] == float(row["router_bias_update_rate"])
