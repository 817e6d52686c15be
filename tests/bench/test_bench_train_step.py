"""Benchmark of a training step with a small model: real processes of both sides, and the gate's failures."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moonlight.bench import train_step
from moonlight.bench.train_step import Setting, SettingResult, Workload
from moonlight.config.load import load_recipe
from moonlight.errors import UserError

TINY = Workload(
    "configs/quickstart.yaml",
    {"model.vocab_size": 256, "model.num_hidden_layers": 2, "train.global_batch_size": 2, "data.sequence_length": 64},
    512,
)
OURS = Setting("ours", "bfloat16", processes=2, expert_parallel_size=2, optimizer="muon")


@pytest.mark.slow
def test_both_sides_start_with_the_same_weights_and_learn(monkeypatch):
    settings = [OURS, replace(OURS, processes=1, expert_parallel_size=1, dtype="float32"), Setting("peer", "bfloat16")]
    monkeypatch.setattr(train_step, "WORKLOADS", {"tiny": TINY})
    monkeypatch.setattr(train_step, "settings", lambda name, optimizer, cores: settings)
    result, notes = train_step._measure("tiny", "muon", 1, 2)
    assert result.ours > 0 and result.peer > 0 and result.ours_rounds and result.bar == ">= 1.5"
    assert [str(setting) in note for setting, note in zip(settings, notes, strict=True)] == [True] * 3
    assert all("(4 x " in note for note in notes)  # micro-batches
    first_losses = [float(note.rsplit(" ", 1)[1]) for note in notes]
    assert max(first_losses) - min(first_losses) < train_step.FIRST_LOSS_TOLERANCE * first_losses[0]
    assert result.passed == (result.ratio >= train_step.BAR)  # the losses passed the gate


def test_the_gate_compares_first_losses_and_requires_a_falling_loss():
    good = SettingResult(9.0, [1.0, 3.0, 2.0], [0.5], [6.0, 5.0])
    assert good.step_seconds(4) == 8.5
    assert train_step._agree([good, replace(good, losses=[6.01, 4.0])])
    assert not train_step._agree([good, replace(good, losses=[6.1, 4.0])])
    assert not train_step._agree([good, replace(good, losses=[6.0, 6.5])])
    assert not train_step._agree([good, replace(good, losses=[6.0, float("nan")])])


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ((1, ["16b"], "muon"), "--model is 16b: quickstart and 0.1b are accepted"),
        ((1, ["0.1b"], "sgd"), "--optimizer is sgd: muon and adamw are accepted"),
    ),
)
def test_errors_name_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        train_step.bench_train_step(*arguments)


def test_a_machine_with_a_gpu_is_rejected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="hide it by CUDA_VISIBLE_DEVICES="):
        train_step.bench_train_step(1, ["quickstart"], "muon")


@pytest.mark.parametrize(
    ("name", "by_cores"), (("quickstart", {1: 1, 2: 2, 6: 4, 12: 8, 16: 8}), ("0.1b", {2: 2, 3: 2, 8: 4}))
)
def test_batch_and_experts_divide_evenly_among_processes(name, by_cores):
    workload = train_step.WORKLOADS[name]
    config = load_recipe(Path(workload.recipe), [f"{key}={value}" for key, value in workload.overrides.items()])
    for cores, processes in by_cores.items():
        assert train_step.max_processes(config, cores) == processes
        tried = train_step.settings(name, "muon", processes)
        assert len(set(tried)) == len(tried)
        for setting in tried:
            assert config.train.global_batch_size % setting.processes == 0
            assert config.model.num_experts % setting.expert_parallel_size == 0


def test_the_large_model_has_fewer_settings():
    assert len(train_step.settings("quickstart", "muon", 2)) > len(train_step.settings("0.1b", "muon", 2)) == 4
