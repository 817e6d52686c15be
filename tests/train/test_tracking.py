"""Weights & Biases: the real package, offline; without a key or a network training goes on after one warning."""

import os
import pty
import select
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from moonlight.config.monitor import MonitorConfig
from moonlight.errors import UserError
from moonlight.train import wandb_log
from moonlight.train.events import read_events
from moonlight.train.metrics import read_metrics
from tests.support.layouts import recipe

ROOT = Path(__file__).parents[2]


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


@pytest.mark.slow
def test_without_a_key_training_goes_on(tiny_run, tmp_path):
    done = pretrain(tiny_run, tmp_path, {})
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "API key" in warnings[0] and "metrics.jsonl" in warnings[0]
    (event,) = [event for event in read_events(tmp_path / "tracked") if event["event"] == "warning"]
    assert "API key" in event["text"]
    assert len(read_metrics(tmp_path / "tracked")) == 4


def test_unreachable(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_log, "INIT_TIMEOUT_SECONDS", 3.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    said = []
    run = replace(recipe(), monitor=MonitorConfig(wandb_project="moonlight-tests"))
    there = wandb_log.WandbLogger(tmp_path, run, said.append)
    for step in range(1, 5):
        started = time.monotonic()
        there.write({"loss/train": 1.0}, step)
        assert time.monotonic() - started < 0.1
    there.close(finished=True)
    assert len(said) == 1 and "Weights & Biases" in said[0] and "metrics.jsonl" in said[0]
    there.write({"loss/train": 1.0}, 5)
    assert len(said) == 1


def on_a_terminal(folder):
    """A run's tracking without a key, in a process whose input and output are a terminal; what it says and its code."""
    program = (
        "import sys; from pathlib import Path; from dataclasses import replace\n"
        "from tests.support.layouts import recipe; from moonlight.config.monitor import MonitorConfig\n"
        "from moonlight.train.wandb_log import WandbLogger\n"
        "run = replace(recipe(), monitor=MonitorConfig(wandb_project='moonlight-tests'))\n"
        f"there = WandbLogger(Path({str(folder)!r}), run, print)\n"
        "there.write({'loss/train': 1.0}, 1); there.close(finished=True)\n"
    )
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment = inherited | {"HOME": str(folder), "NETRC": str(folder / "netrc")}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    said = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            said += os.read(ours, 4096)
        except OSError:  # its other end was closed
            break
    os.close(ours)
    return said.decode(), process.wait(10)


def test_nobody_is_asked_for_a_key(tmp_path):
    started = time.monotonic()
    said, code = on_a_terminal(tmp_path)
    assert code == 0 and "API key" in said and "choice" not in said.lower(), said
    assert time.monotonic() - started < 30


def test_a_run_that_is_stopped_does_not_wait_for_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_log, "LEAVE_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    said = []
    there = wandb_log.WandbLogger(
        tmp_path, replace(recipe(), monitor=MonitorConfig(wandb_project="moonlight-tests")), said.append
    )
    started = time.monotonic()
    there.close(finished=False)
    assert time.monotonic() - started < 2 and len(said) == 1


def test_a_missing_package_is_named_before_work_starts(monkeypatch):
    monkeypatch.setattr(wandb_log.importlib.util, "find_spec", lambda name: None)
    wandb_log.check_installed(recipe())
    with pytest.raises(UserError, match="pip install wandb"):
        wandb_log.check_installed(replace(recipe(), monitor=MonitorConfig(wandb_project="mine")))
