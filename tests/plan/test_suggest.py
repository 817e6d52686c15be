"""`moonlight plan --suggest`: layouts that fit, fastest first, and a one-line error if none fits."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from moonlight.config.load import load_recipe
from moonlight.errors import UserError
from moonlight.plan.build import estimate_plan, make_plan
from moonlight.plan.figures import RESERVE
from moonlight.plan.hardware import HardwareModel, hardware_model
from moonlight.plan.suggest import suggest
from moonlight.plan.suggest_text import overrides
from tests.support.layouts import recipe
from tests.support.suites import quick

ROOT = Path(__file__).parents[2]
BIG = ROOT / "configs/moonlight_16b_a3b/pretrain.yaml"


def big(*settings):
    return load_recipe(BIG, settings)


@pytest.mark.parametrize(("gpus", "gpu"), quick([(64, "h100"), (2048, "h100"), (16, "h200")], (64, "h100")))
def test_suggestions_fit_and_are_the_fastest(gpus, gpu):
    started = time.process_time()
    suggestion = suggest(big(), gpus, hardware_model(gpu))
    assert time.process_time() - started < 40
    times = [plan.seconds.total for plan in suggestion.best]
    assert len(times) == 10 and times == sorted(times)
    free_bytes = suggestion.machine.memory_bytes * (1 - RESERVE)
    for plan in suggestion.best:
        assert plan.memories[plan.peak_rank].peak <= free_bytes
        # The suggested overrides give the same plan.
        again = make_plan(big(*overrides(plan.config)), gpus, suggestion.machine)
        assert again.seconds == plan.seconds and again.config == plan.config
    assert sum(count for count, _ in suggestion.reasons) + suggestion.num_fitting == suggestion.num_layouts
    assert any("memory is short" in reason for _, reason in suggestion.reasons)


@pytest.mark.parametrize("settings", [(), ("parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=4")])
@pytest.mark.parametrize("gpus", [64, 512])
def test_an_estimate_is_near_the_plan(gpus, settings):
    config = big(*settings)
    plan, estimate = make_plan(config, gpus), estimate_plan(config, gpus, HardwareModel())
    assert estimate.memories[estimate.peak_rank].peak == pytest.approx(plan.memories[plan.peak_rank].peak, rel=0.04)
    assert estimate.seconds.total == pytest.approx(plan.seconds.total, rel=0.01)
    assert estimate.memories[0].state == pytest.approx(plan.memories[0].state, rel=0.01)


def test_nothing_fits():
    with pytest.raises(UserError) as caught:
        suggest(big(), 8, hardware_model("a100", memory_gb=20))
    message = str(caught.value)
    assert "fits on no layout of 8 a100 GPUs" in message and "more than 18.80 GB (94% of a GPU)" in message
    assert "its largest part is" in message and "\n" not in message


def test_no_layout_divides():
    config = recipe()
    config = replace(config, train=replace(config.train, global_batch_size=8))
    with pytest.raises(UserError, match=r"no layout divides 13 GPUs .* nearby counts that work are 8, 10, 16, 20"):
        suggest(config, 13, HardwareModel())


def suggest_command(*arguments):
    command = [sys.executable, "-m", "moonlight.cli", "plan", str(BIG), "--gpus", "512", "--suggest", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_the_command(refuses):
    process = suggest_command()
    assert process.returncode == 0 and not process.stderr
    assert "excluded layouts, by reason:" in process.stdout
    assert "settings of the first layout: those of the recipe" in process.stdout
    assert max(map(len, process.stdout.splitlines())) <= 100
    refuses(["plan", BIG, "--gpus", "8", "--gpu-memory", "20", "--suggest"], "fits on no layout of 8 h100 GPUs")
    refuses(["plan", BIG, "--gpus", "2039", "--suggest"], "no layout divides 2039 GPUs", "nearby counts that work")


@pytest.mark.slow
def test_the_command_reports_changed_settings_and_json():
    process = suggest_command("parallel.tensor_parallel_size=4")
    assert "\nsettings of the first layout: parallel.tensor_parallel_size=1\n" in process.stdout
    assert len(json.loads(suggest_command("--json").stdout)["best"]) == 10
