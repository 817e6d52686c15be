"""A run that was stopped and resumed must be bit-identical to an uninterrupted run."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moonlight.config.load import to_yaml
from moonlight.train.metrics import read_metrics
from tests.support.comparisons import check_same, outcome
from tests.support.faults import kill_after
from tests.support.layouts import LAYOUTS, make_run, train_run
from tests.support.suites import slow

ROOT = Path(__file__).parents[2]


SMALL_STATE = {"momentum_dtype": "bfloat16", "master_weights": "split"}


@pytest.mark.parametrize(
    ("layout", "dtype", "optimizer"),
    [
        slow("1", "float32", {}),
        slow("EP2", "bfloat16", {}),
        ("DP2", "bfloat16", SMALL_STATE),
        ("EP2xTP2-4", "float32", {"momentum_dtype": "bfloat16"}),
    ],
)
def test_stopped_and_resumed_is_bit_identical(pool, data_folder, tokenizer_folder, tmp_path, layout, dtype, optimizer):
    world_size, _ = LAYOUTS[layout]

    def make_config(folder):
        config = make_run(tmp_path / folder, data_folder, tokenizer_folder, layout, dtype=dtype, validation_sequences=4)
        return replace(config, optimizer=replace(config.optimizer, **optimizer))

    uninterrupted, parts = make_config("uninterrupted"), make_config("parts")
    pool.run(world_size, train_run, uninterrupted)
    pool.run(world_size, train_run, replace(parts, train=replace(parts.train, stop_at_step=5)))
    assert outcome(parts)[0] == 5
    pool.run(world_size, train_run, parts)
    check_same(uninterrupted, parts)


def test_resuming_in_another_layout_sees_the_same_data(pool, data_folder, tokenizer_folder, tmp_path):
    """Losses must agree to 1e-5 in the steps after a change of layout.

    Newton-Schulz runs in float32 to avoid rounding noise.
    """

    def make_config(folder, layout):
        config = make_run(tmp_path / folder, data_folder, tokenizer_folder, layout)
        return replace(config, name="same", optimizer=replace(config.optimizer, newton_schulz_dtype="float32"))

    uninterrupted = make_config("uninterrupted", "1")
    pool.run(1, train_run, uninterrupted)
    before, after = make_config("parts", "DP2"), make_config("parts", "EP2xPP2")
    pool.run(2, train_run, replace(before, train=replace(before.train, stop_at_step=4)))
    pool.run(4, train_run, after)
    expected = [entry["loss/train"] for entry in read_metrics(tmp_path / "uninterrupted" / "same")]
    assert [entry["loss/train"] for entry in read_metrics(tmp_path / "parts" / "same")] == pytest.approx(
        expected, rel=1e-5
    )


def pretrain(recipe_file):
    command = [sys.executable, "-m", "moonlight.cli", "pretrain", str(recipe_file)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True, text=True)


@pytest.mark.slow
def test_killed_run_is_bit_identical(pool, data_folder, tokenizer_folder, tmp_path):
    """The command is killed by SIGKILL twice at random moments of a 40-step run; its workers must end with it."""
    runs = {}
    for name in ("uninterrupted", "killed"):
        config = make_run(
            tmp_path / name,
            data_folder,
            tokenizer_folder,
            "EP2",
            train_steps=40,
            save_every_steps=5,
            validate_every_steps=20,
        )
        runs[name] = replace(config, train=replace(config.train, threads_per_process=1))
    pool.run(2, train_run, runs["uninterrupted"])

    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(to_yaml(runs["killed"]))
    metrics = tmp_path / "killed" / "EP2"
    for steps in (7, 18):
        process = pretrain(recipe_file)
        kill_after(process, metrics, steps)
    process = pretrain(recipe_file)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "resuming after step" in errors
    check_same(runs["uninterrupted"], runs["killed"])
