"""A hanging process must end, report its stacks, and let the run resume."""

import os
import signal

import pytest

from moonlight.config.load import to_yaml
from moonlight.dist_checkpoint.state import resolve_checkpoint
from moonlight.errors import CODE_HUNG
from moonlight.train.events import read_events
from tests.support.faults import end, reached, start, wait_until, workers
from tests.support.layouts import make_run
from tests.support.suites import quick


@pytest.mark.parametrize("restarts", quick([0, 1], 1))
def test_a_frozen_process_ends_the_others(data_folder, tokenizer_folder, tmp_path, restarts):
    """With a restart, the frozen process must be killed too, and the run must finish."""
    config = make_run(
        tmp_path,
        data_folder,
        tokenizer_folder,
        "DP2",
        threads_per_process=1,
        train_steps=30,
        save_every_steps=10,
        validate_every_steps=30,
        hang_timeout_seconds=10.0,
        max_restarts=restarts,
    )
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "DP2"
    recipe.write_text(to_yaml(config))
    process = start(recipe)
    assert wait_until(reached(folder, 12), process)
    frozen = workers(process)[1]
    os.kill(frozen.pid, signal.SIGSTOP)
    errors = end(process)
    line = "made no progress for 10 s after step"
    assert "error: rank 0 on " in errors and line in errors and "train.hang_timeout_seconds=10" in errors
    stacks = (folder / "stacks" / "rank-00000.txt").read_text()
    assert line in stacks and "most recent call first" in stacks and 'loop.py", line' in stacks
    assert not frozen.is_running()
    if restarts:
        assert process.returncode == 0, errors
        assert "process 0 of 2 ended with code 134" in errors and "restart 1 of 1" in errors
        assert resolve_checkpoint(folder).name == "step-00000030"
        resumed = [event for event in read_events(folder) if event["event"] == "resumed"]
        assert [(event["step"] >= 10, event["restart"]) for event in resumed] == [(True, 1)]
    else:
        assert process.returncode == CODE_HUNG, errors
        assert "Traceback" not in errors
