"""Weights & Biases: the real package, offline; without a key or a network training goes on after one warning."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from layouts import recipe

from moonlight.config_monitor import Monitor
from moonlight.errors import UserError
from moonlight.train import tracking
from moonlight.train.metrics import read_metrics

ROOT = Path(__file__).parent.parent


def pretrain(tiny_run, folder, environment):
    """A run of four steps that asks for Weights & Biases."""
    command = [sys.executable, "-m", "moonlight.cli", "pretrain", str(tiny_run.recipe)]
    command += [f"runs_folder={folder}", "name=tracked", "monitor.wandb_project=moonlight-tests"]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment = inherited | {"HOME": str(folder), "NETRC": str(folder / "netrc")} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def test_offline(tiny_run, tmp_path):
    done = pretrain(tiny_run, tmp_path, {"WANDB_MODE": "offline"})
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    (record,) = (tmp_path / "tracked" / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    for key in (b"loss/train", b"optim/update_rms/experts", b"moe/max_load", b"moonlight-tests"):
        assert key in content
    assert len(read_metrics(tmp_path / "tracked")) == 4
    identifier = (tmp_path / "tracked" / "wandb" / "identifier").read_text().strip()
    assert identifier in record.name


def test_without_a_key_training_goes_on(tiny_run, tmp_path):
    done = pretrain(tiny_run, tmp_path, {})
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "API key" in warnings[0] and "training goes on" in warnings[0]
    assert len(read_metrics(tmp_path / "tracked")) == 4


def test_unreachable(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "INIT_TIMEOUT_SECONDS", 3.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    said = []
    run = replace(recipe(), monitor=Monitor(wandb_project="moonlight-tests"))
    there = tracking.Tracking(tmp_path, run, said.append)
    for step in range(1, 5):
        started = time.monotonic()
        there.write({"loss/train": 1.0}, step)
        assert time.monotonic() - started < 0.1
    there.close()
    assert len(said) == 1 and "Weights & Biases" in said[0] and "training goes on" in said[0]
    there.write({"loss/train": 1.0}, 5)
    assert len(said) == 1


def test_a_missing_package_is_named_before_work_starts(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    tracking.check_installed(recipe())
    with pytest.raises(UserError, match="pip install wandb"):
        tracking.check_installed(replace(recipe(), monitor=Monitor(wandb_project="mine")))
