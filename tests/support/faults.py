"""Runs that something happens to: starting them, finding their processes, waiting for what they do."""

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
    """`moonlight pretrain`, or with restarts of torchrun two processes of `-m pretrain`, in a session of its own."""
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
    """What the command wrote to stderr, once it has ended."""
    try:
        return process.communicate(timeout=PATIENCE_S)[1]
    finally:
        process.kill()


def workers(process):
    """Its training processes by rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "pretrain" in child.cmdline():
                found[int(child.environ()["RANK"])] = child
        except (psutil.NoSuchProcess, psutil.AccessDenied, KeyError):
            continue
    return found


def wait_until(condition, process):
    """Poll until `condition()`, while the command runs; False if it ended first."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(0.01)
    return True


def reached(folder, step):
    """Whether metrics.jsonl has come to a step."""

    def has():
        entries = read_metrics(folder)
        return bool(entries) and entries[-1]["step"] >= step

    return has


def kill_after(process, run_folder, steps):
    """kill -9 of the command, at some moment after its run has written `steps` steps."""
    wait_until(lambda: len(read_metrics(run_folder)) >= steps, process)
    time.sleep(random.random() / 4)
    process.kill()
    process.communicate()
