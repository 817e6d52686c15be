"""Training of a study's runs, each in a process of `moonlight pretrain`. An interrupted study resumes.

One thread starts, polls and stops the processes. The kernel kills a child process when the thread that started it ends,
so a killed study leaves no process behind.
"""

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from moonlight.config.run import RunConfig
from moonlight.config.timeline import RunSchedule
from moonlight.errors import CODE_STOPPED, UserError
from moonlight.files import make_folder
from moonlight.plan.flops import train_flops_per_token
from moonlight.studies.results import StudyResult, losses, write_results
from moonlight.studies.study import STANDARD_LIBRARY, P, Study, total_flops
from moonlight.train import run_folder
from moonlight.train.metrics import read_metrics
from pretrain.local import die_with_parent

POLL_SECONDS = 0.2
SAVE_TIMEOUT_SECONDS = 60.0
"""Time that runs have to save and stop."""
CURVE_POINTS = 60
"""Points of the stored training loss curve; each is a mean over the same number of steps."""
_Running = dict[P, tuple[subprocess.Popen, IO[bytes]]]


def available_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_parallel_runs(study: Study[P]) -> int:
    """Return the number of simultaneous runs."""
    config = study.first_config()
    cores_per_run = config.parallel.num_processes * max(1, config.train.threads_per_process)
    return study.side_by_side or max(1, available_cores() // cores_per_run)


def find_corpus(study: Study[P]) -> Path | None:
    """Return the path of the study's text, or None if it has none. Raise UserError if the path does not exist."""
    if not study.corpus:
        return None
    import sysconfig

    corpus = Path(sysconfig.get_path("stdlib") if study.corpus == STANDARD_LIBRARY else study.corpus)
    if not corpus.exists():
        raise UserError(f"corpus {corpus} of {study.kind} {study.path} does not exist: give a folder or file of text")
    return corpus


def prepare_data(study: Study[P]) -> None:
    """Prepare tokenizer and data if they are missing and the study has a corpus.

    Raises:
        UserError: the corpus does not exist, or a command failed.
    """
    corpus = find_corpus(study)
    if corpus is None:
        return
    config = study.first_config()
    tokenizer, data = Path(config.data.tokenizer), Path(config.data.path)
    if not tokenizer.exists():
        vocabulary = ("--vocab-size", config.model.vocab_size)
        _run_command("tokenizer", "train", "--input", corpus, *vocabulary, "--out", tokenizer)
    if not data.exists():
        fraction = ("--validation-share", study.validation_share)
        _run_command("data", "prepare", "--input", corpus, "--tokenizer", tokenizer, "--out", data, *fraction)


def _run_command(*arguments: object) -> None:
    command = [sys.executable, "-m", "moonlight.cli", *map(str, arguments)]
    if subprocess.run(command).returncode:
        raise UserError(f"moonlight {' '.join(map(str, arguments))} failed (see its output above)")


def train_all(study: Study[P], results: dict[P, StudyResult[P]]) -> None:
    """Train all pending runs. Add each result to `results` and rewrite the results file.

    Raises:
        UserError: a run failed and did not diverge; the message names its log.
    """
    logs, points = study.folder_path / "logs", study.folder_path / "points"
    for folder in (logs, points):
        make_folder(folder)
    _delete_checkpoints(study, results)
    max_running, started, done_flops = num_parallel_runs(study), time.monotonic(), 0.0
    running: _Running[P] = {}
    if study.pending_runs(losses(results)):
        print(f"up to {max_running} runs at a time; logs are in {logs}", flush=True)
    with _stopping_at_exit(running):
        while True:
            pending = study.pending_runs(losses(results))
            for point in [point for point in pending if point not in running][: max_running - len(running)]:
                output = (logs / f"{point.name}.log").open("ab")
                running[point] = (_start_run(study, point, output), output)
            if not running:
                return
            point = _wait_for_any(running)
            process, log = running.pop(point)
            log.close()
            results[point] = read_run_result(study, point, process.returncode, logs / f"{point.name}.log")
            write_results(study, results)
            _delete_checkpoints(study, results)
            done_flops += total_flops(study, [point])
            pending_flops = total_flops(study, study.pending_runs(losses(results)))
            flops_per_second = done_flops / (time.monotonic() - started)
            _print_progress(results[point], len(results), pending_flops / flops_per_second)


def _start_run(study: Study[P], point: P, log: IO[bytes]) -> subprocess.Popen:
    command = [sys.executable, "-m", "moonlight.cli", "pretrain", str(study.recipe_path), *study.overrides(point)]
    # A new session: Ctrl-C reaches this command only, which then stops its runs with a checkpoint.
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def _wait_for_any(running: _Running[P]) -> P:
    """Return the first run whose process has ended."""
    while True:
        for point, (process, _) in running.items():
            if process.poll() is not None:
                return point
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _stopping_at_exit(running: _Running[P]) -> Iterator[None]:
    """Let running processes save and stop when the block ends, also after an exception. SIGTERM ends the block."""

    def stop(signal_number: int, frame: Any) -> None:
        raise SystemExit(CODE_STOPPED)

    previous_handler = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
        if running:
            print(f"stopping {len(running)} runs after a save", file=sys.stderr, flush=True)
        for process, _ in running.values():
            process.terminate()
        deadline = time.monotonic() + SAVE_TIMEOUT_SECONDS
        for process, log in running.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.close()


def read_run_result(study: Study[P], point: P, code: int, log: Path) -> StudyResult[P]:
    """Return the result of a run whose process ended with exit code `code`.

    Raises:
        UserError: the run failed and did not diverge.
    """
    config = study.make_config(point)
    folder = run_folder.run_path(config)
    entries = read_metrics(folder)
    diverged = divergence(entries, config)
    if not diverged and (code or not entries or "loss/held_out" not in entries[-1]):
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise UserError(f"run {point.name} failed with exit code {code}: {lines[-1][:300]} (see {log})")
    tokens = entries[-1]["consumed_tokens"]
    return StudyResult(
        point=point,
        diverged=diverged,
        loss=None if diverged else entries[-1]["loss/held_out"],
        steps=entries[-1]["step"],
        tokens=tokens,
        flops=tokens * train_flops_per_token(config.model, config.data.sequence_length),
        seconds=sum(entry["time/step_seconds"] for entry in entries),
        svd_entropy=_last_by_group(entries, "optim/svd_entropy/"),
        update_rms=_last_by_group(entries, "optim/update_rms/"),
        curve=[] if diverged else _curve(entries),
    )


def _last_by_group(entries: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    """Return the finite values of the last entry that has keys with this prefix, by the rest of the key."""
    for entry in reversed(entries):
        if values := {key.removeprefix(prefix): value for key, value in entry.items() if key.startswith(prefix)}:
            return {name: value for name, value in values.items() if math.isfinite(value)}
    return {}


def _curve(entries: list[dict[str, Any]]) -> list[list[float]]:
    """Return [tokens, mean training loss since the previous point] in CURVE_POINTS parts, without skipped steps."""
    points, start = [], 0
    for index in range(1, CURVE_POINTS + 1):
        stop = index * len(entries) // CURVE_POINTS
        finite = [loss for entry in entries[start:stop] if math.isfinite(loss := entry["loss/train"])]
        if finite:
            points.append([entries[stop - 1]["consumed_tokens"], sum(finite) / len(finite)])
            start = stop
    return points


def divergence(entries: list[dict[str, Any]], config: RunConfig) -> str:
    """Return why a finished run counts as diverged; empty if it did not diverge or failed for another reason."""
    if not entries:
        return ""
    last, max_skipped = entries[-1], config.train.max_skipped_steps_in_a_row
    before = entries[-max_skipped - 1]["optim/skipped_steps"] if len(entries) > max_skipped else 0
    if last["step"] < RunSchedule(config).num_steps:
        num_skipped = last["optim/skipped_steps"] - before
        return f"no finite step in {max_skipped} up to step {last['step']}" if num_skipped >= max_skipped else ""
    loss = last.get("loss/held_out", 0.0)
    if not math.isfinite(loss):
        return "the loss is not finite"
    if loss >= math.log(config.model.vocab_size):
        return f"the loss, {loss:.3f}, is no better than guessing"
    return ""


def _delete_checkpoints(study: Study[P], results: dict[P, StudyResult[P]]) -> None:
    """Delete checkpoints and data order of finished runs, to free space, except checkpoints that are still needed."""
    kept = study.runs_to_keep(losses(results))
    for point in results:
        for name in (".order", *["checkpoints"] * (point not in kept)):
            shutil.rmtree(study.folder_path / "points" / point.name / name, ignore_errors=True)


def _print_progress(result: StudyResult[P], num_done: int, seconds_left: float) -> None:
    outcome = f"diverged, {result.diverged}" if result.diverged else f"held-out loss {result.loss:.4f}"
    left = f"at least {seconds_left / 60:.0f} min left" if seconds_left else "none left"
    print(f"{result.point.name}: {outcome} ({result.seconds:.0f} s of steps); {num_done} runs done, {left}", flush=True)
