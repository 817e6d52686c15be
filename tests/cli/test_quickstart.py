"""`moonlight quickstart`: interrupted and started again, it finishes with the bytes of an uninterrupted one."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from moonlight.config.load import to_yaml
from tests.support.layouts import make_run

ROOT = Path(__file__).parents[2]
PATIENCE_S = 240
NEEDED = {"hf/model-00001-of-00001.safetensors", "data/train.bin", "tokenizer/tokenizer.model", "completion.txt"}


def start(folder, corpus):
    """`moonlight quickstart` in a process group of its own, as a terminal would start it."""
    command = [sys.executable, "-m", "moonlight.cli", "quickstart", "--corpus", str(corpus), "--recipe", "recipe.yaml"]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # A shell that runs these tests in the background hands on an ignored SIGINT; a terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        text=True,
    )


def finish(folder, corpus):
    process = start(folder, corpus)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    return output


def check_again(output):
    """The output of a start after everything has been done."""
    for done in (
        "this tokenizer has been trained already",
        "this data has been prepared already",
        "this run is already finished",
        "this checkpoint is exported already",
        "verification, completion: done already",
    ):
        assert done in output


def hashes(folder):
    """SHA-256 of everything that must not depend on interruptions, by name within the run folder."""
    patterns = ("tokenizer/*", "data/*.bin", "data/*.idx", "data/manifest.json", "hf/*", "completion.txt")
    (run,) = (folder / "runs").iterdir()
    files = [file for pattern in patterns for file in run.glob(pattern) if file.name != "export.json"]
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def folders(tmp_path, data_folder, tokenizer_folder):
    """Two folders with the same small recipe."""
    run = make_run(Path("runs"), data_folder, tokenizer_folder, "EP2", train_steps=30, save_every_steps=5)
    run = replace(run, train=replace(run.train, threads_per_process=1, validate_every_steps=15))
    made = (tmp_path / "whole", tmp_path / "broken")
    for folder in made:
        folder.mkdir()
        (folder / "recipe.yaml").write_text(to_yaml(run))
    return made


@pytest.mark.slow
def test_interrupted_at_any_moment_ends_the_same(folders, small_corpus):
    """Eight interruptions, kill -9 of the whole group and Ctrl-C in turn, each at a random moment."""
    whole, broken = folders
    finish(whole, small_corpus)
    assert hashes(whole).keys() >= NEEDED
    generator = random.Random(7)
    finished = False
    for number in range(8):
        process = start(broken, small_corpus)
        time.sleep(1.0 + generator.random() * 12)
        finished = process.poll() is not None
        if not finished:
            os.killpg(process.pid, signal.SIGKILL if number % 2 else signal.SIGINT)
        process.communicate(timeout=PATIENCE_S)
        if finished:
            break
    finish(broken, small_corpus)
    assert hashes(broken) == hashes(whole)

    check_again(finish(whole, small_corpus))
    assert not list(broken.rglob("*.part"))


def test_ctrl_c_while_training_is_quiet_and_the_next_start_finishes(folders, small_corpus):
    folder, _ = folders
    process = start(folder, small_corpus)
    deadline = time.monotonic() + PATIENCE_S
    while not list(folder.glob("runs/*/checkpoints/latest")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert output.count("interrupted: rerun the command to resume") == 1
    assert "Traceback" not in output, output

    finish(folder, small_corpus)
    done = hashes(folder)
    assert done.keys() >= NEEDED
    check_again(finish(folder, small_corpus))
    assert hashes(folder) == done
    assert not list(folder.rglob("*.part"))
