"""`moonlight quickstart`, interrupted and rerun, ends with the same bytes as an uninterrupted run."""

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
    """Start `moonlight quickstart` in its own process group, as a terminal does."""
    command = [sys.executable, "-m", "moonlight.cli", "quickstart", "--corpus", str(corpus), "--recipe", "recipe.yaml"]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # A shell that runs the tests in the background makes its children ignore SIGINT; a terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        text=True,
    )


def finish(folder, corpus):
    """Run `moonlight quickstart` to its end and return its output."""
    process = start(folder, corpus)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    return output


def check_all_skipped(output):
    """Check that a rerun skipped every finished step."""
    for message in (
        "this tokenizer has been trained already",
        "this data has been prepared already",
        "this run is already finished",
        "this checkpoint is exported already",
        "verification, completion: done already",
    ):
        assert message in output


def hashes(folder):
    """Return the SHA-256 of each file that must not depend on interruptions, by path in the run folder."""
    patterns = ("tokenizer/*", "data/*.bin", "data/*.idx", "data/manifest.json", "hf/*", "completion.txt")
    (run_dir,) = (folder / "runs").iterdir()
    files = [file for pattern in patterns for file in run_dir.glob(pattern) if file.name != "export.json"]
    return {str(file.relative_to(run_dir)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def folders(tmp_path, data_folder, tokenizer_folder):
    """Two folders with the same small recipe."""
    config = make_run(Path("runs"), data_folder, tokenizer_folder, "EP2", train_steps=30, save_every_steps=5)
    config = replace(config, train=replace(config.train, threads_per_process=1, validate_every_steps=15))
    folders = (tmp_path / "uninterrupted", tmp_path / "interrupted")
    for folder in folders:
        folder.mkdir()
        (folder / "recipe.yaml").write_text(to_yaml(config))
    return folders


@pytest.mark.slow
def test_random_interruptions_do_not_change_the_result(folders, small_corpus):
    """Eight interruptions at random times, alternately Ctrl-C and kill -9 of the process group."""
    uninterrupted, interrupted = folders
    finish(uninterrupted, small_corpus)
    assert hashes(uninterrupted).keys() >= NEEDED
    generator = random.Random(7)
    finished = False
    for index in range(8):
        process = start(interrupted, small_corpus)
        time.sleep(1.0 + generator.random() * 12)
        finished = process.poll() is not None
        if not finished:
            os.killpg(process.pid, signal.SIGKILL if index % 2 else signal.SIGINT)
        process.communicate(timeout=PATIENCE_S)
        if finished:
            break
    finish(interrupted, small_corpus)
    assert hashes(interrupted) == hashes(uninterrupted)

    check_all_skipped(finish(uninterrupted, small_corpus))
    assert not list(interrupted.rglob("*.part"))


def test_ctrl_c_in_training_prints_one_line_and_a_rerun_finishes(folders, small_corpus):
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
    expected = hashes(folder)
    assert expected.keys() >= NEEDED
    check_all_skipped(finish(folder, small_corpus))
    assert hashes(folder) == expected
    assert not list(folder.rglob("*.part"))
