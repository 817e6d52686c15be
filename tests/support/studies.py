"""Helpers for the tests of ladders and ablations: a small recipe, and a command that is interrupted twice."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from moonlight.config.load import to_yaml
from tests.support.layouts import recipe

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120


def write_recipe(path, data_folder, tokenizer_folder, **model):
    """Write a recipe of four steps with 1,024 ids."""
    config = recipe(train_steps=4, threads_per_process=1, save_every_steps=2)
    config = replace(
        config,
        model=replace(config.model, vocab_size=1024, **model),
        data=replace(config.data, path=str(data_folder), tokenizer=str(tokenizer_folder)),
    )
    path.write_text(to_yaml(config))


def command(*arguments):
    """Return the command line of `moonlight` with arguments."""
    return [sys.executable, "-m", "moonlight.cli", *map(str, arguments)]


def call(*arguments):
    """Run `moonlight` with arguments to its end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": PATIENCE_S}
    return subprocess.run(command(*arguments), **options)


def ended(study):
    """Return the names of the finished runs, in the order of the results."""
    path = study.folder_path / "results.json"
    entries = json.loads(path.read_text())["points"] if path.exists() else []
    keys = [field.name for field in dataclasses.fields(study.point_type)]
    return [study.point_type(**{key: entry[key] for key in keys}).name for entry in entries]


def call_interrupted(study, *arguments, ends=(signal.SIGKILL, signal.SIGTERM)):
    """Kill the command after its first result, stop it after its second, then run it to its end.

    Finished runs must stay unchanged, and no run may execute twice.
    """

    def events(name):
        return (study.folder_path / "points" / name / "events.jsonl").read_bytes()

    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done: dict[str, bytes] = {}
    for count, end in enumerate(ends, start=1):
        process = subprocess.Popen(command(*arguments), cwd=ROOT, env=environment, stderr=subprocess.PIPE)
        deadline = time.monotonic() + PATIENCE_S
        while len(ended(study)) < count and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(end)
        process.communicate(timeout=PATIENCE_S)
        done |= {name: events(name) for name in ended(study) if name not in done}
        assert count <= len(done)
    process = call(*arguments)
    assert len(ended(study)) == len(set(ended(study)))
    for name, before in done.items():
        assert events(name) == before
    return process


def steps_of(study, name):
    """Return the steps in the metrics of a run."""
    lines = (study.folder_path / "points" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]
