"""Weights & Biases, the real package offline: without a key or a network, training continues after one warning."""

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
    """Train four steps with Weights & Biases enabled."""
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
def test_without_a_key_training_continues(tiny_run, tmp_path):
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
    messages = []
    config = replace(recipe(), monitor=MonitorConfig(wandb_project="moonlight-tests"))
    logger = wandb_log.WandbLogger(tmp_path, config, messages.append)
    for step in range(1, 5):
        started = time.monotonic()
        logger.write({"loss/train": 1.0}, step)
        assert time.monotonic() - started < 0.1
    logger.close(finished=True)
    assert len(messages) == 1 and "Weights & Biases" in messages[0] and "metrics.jsonl" in messages[0]
    logger.write({"loss/train": 1.0}, 5)
    assert len(messages) == 1


def on_a_terminal(folder):
    """Log without a key in a process on a terminal; return its output and exit code."""
    program = (
        "import sys; from pathlib import Path; from dataclasses import replace\n"
        "from tests.support.layouts import recipe; from moonlight.config.monitor import MonitorConfig\n"
        "from moonlight.train.wandb_log import WandbLogger\n"
        "config = replace(recipe(), monitor=MonitorConfig(wandb_project='moonlight-tests'))\n"
        f"logger = WandbLogger(Path({str(folder)!r}), config, print)\n"
        "logger.write({'loss/train': 1.0}, 1); logger.close(finished=True)\n"
    )
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment = inherited | {"HOME": str(folder), "NETRC": str(folder / "netrc")}
    parent_end, child_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, stdin=child_end, stdout=child_end, stderr=child_end
    )
    os.close(child_end)
    output = b""
    while select.select([parent_end], [], [], 60)[0]:
        try:
            output += os.read(parent_end, 4096)
        except OSError:  # the other end was closed
            break
    os.close(parent_end)
    return output.decode(), process.wait(10)


def test_there_is_no_prompt_for_a_key(tmp_path):
    started = time.monotonic()
    output, code = on_a_terminal(tmp_path)
    assert code == 0 and "API key" in output and "choice" not in output.lower(), output
    assert time.monotonic() - started < 30


def test_a_stopped_run_does_not_wait_for_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_log, "LEAVE_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    messages = []
    logger = wandb_log.WandbLogger(
        tmp_path, replace(recipe(), monitor=MonitorConfig(wandb_project="moonlight-tests")), messages.append
    )
    started = time.monotonic()
    logger.close(finished=False)
    assert time.monotonic() - started < 2 and len(messages) == 1


def test_a_missing_package_is_named_before_work_starts(monkeypatch):
    monkeypatch.setattr(wandb_log.importlib.util, "find_spec", lambda name: None)
    wandb_log.check_installed(recipe())
    with pytest.raises(UserError, match="pip install wandb"):
        wandb_log.check_installed(replace(recipe(), monitor=MonitorConfig(wandb_project="mine")))
