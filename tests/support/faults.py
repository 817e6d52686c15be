"""Helpers for the tests of faults: start runs, find their processes, wait for their progress."""

import random
import subprocess
import sys
import time
from pathlib import Path

import psutil

from moonlight.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
PATIENCE_S = 300


def start(recipe, *arguments, torchrun_restarts=None, **options):
    """Start `moonlight pretrain` in a new session.

    With `torchrun_restarts`, start two processes of `-m pretrain` under torchrun instead.
    """
    command = [sys.executable, "-m", "moonlight.cli", "pretrain"]
    if torchrun_restarts is not None:
        command = [sys.executable, "-m", "pretrain.agent", str(PATIENCE_S), "--standalone", "--nproc-per-node", "2"]
        command += ["--monitor-interval", "0.1", "--max-restarts", str(torchrun_restarts), "-m", "pretrain"]
    command += [str(recipe), *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def end(process):
    """Wait until the command ends, and return its stderr."""
    try:
        return process.communicate(timeout=PATIENCE_S)[1]
    finally:
        process.kill()


def workers(process):
    """Return the training processes of the command by rank."""
    by_rank = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "pretrain" in child.cmdline():
                by_rank[int(child.environ()["RANK"])] = child
        except (psutil.NoSuchProcess, psutil.AccessDenied, KeyError):
            continue
    return by_rank


def wait_until(condition, process):
    """Poll until `condition()` while the command runs; return False if the command ends first."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, f"the condition was not met within {PATIENCE_S} s"
        time.sleep(0.01)
    return True


def reached(folder, step):
    """Return a condition: metrics.jsonl has reached a step."""

    def has_reached():
        entries = read_metrics(folder)
        return bool(entries) and entries[-1]["step"] >= step

    return has_reached


def kill_after(process, run_folder, steps):
    """Kill the command with SIGKILL at a random moment after its run has written `steps` steps."""
    wait_until(lambda: len(read_metrics(run_folder)) >= steps, process)
    time.sleep(random.random() / 4)
    process.kill()
    process.communicate()
