"""The runs of a study, each a process of `moonlight pretrain`, side by side; interrupted at any moment it goes on.

One thread starts, watches and ends the processes: the kernel ends a child when the thread that started it ends, so
nothing goes on training behind a study that was killed.
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

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_SAVE = 60.0
"""For runs that were asked to save and stop."""
CURVE_POINTS = 60
"""Of the training loss that is kept of a run; each is a mean over as many steps."""
_Running = dict[P, tuple[subprocess.Popen, IO[bytes]]]


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(study: Study[P]) -> int:
    """How many runs go on at a time."""
    config = study.first_run()
    each = config.parallel.num_processes * max(1, config.train.threads_per_process)
    return study.side_by_side or max(1, cores() // each)


def find_corpus(study: Study[P]) -> Path | None:
    """The text that a study names, if it names one; raise UserError if there is no such text."""
    if not study.corpus:
        return None
    import sysconfig

    corpus = Path(sysconfig.get_path("stdlib") if study.corpus == STANDARD_LIBRARY else study.corpus)
    if not corpus.exists():
        raise UserError(f"corpus {corpus} of {study.kind} {study.path} does not exist: give a folder or file of text")
    return corpus


def prepare_data(study: Study[P]) -> None:
    """Make tokenizer and data if the study names a corpus and they are missing.

    Raises:
        UserError: the corpus does not exist, or a step failed.
    """
    corpus = find_corpus(study)
    if corpus is None:
        return
    config = study.first_run()
    tokenizer, data = Path(config.data.tokenizer), Path(config.data.path)
    if not tokenizer.exists():
        vocabulary = ("--vocab-size", config.model.vocab_size)
        _step("tokenizer", "train", "--input", corpus, *vocabulary, "--out", tokenizer)
    if not data.exists():
        share = ("--validation-share", study.validation_share)
        _step("data", "prepare", "--input", corpus, "--tokenizer", tokenizer, "--out", data, *share)


def _step(*arguments: object) -> None:
    command = [sys.executable, "-m", "moonlight.cli", *map(str, arguments)]
    if subprocess.run(command).returncode:
        raise UserError(f"moonlight {' '.join(map(str, arguments))} failed: it has said why")


def train_all(study: Study[P], results: dict[P, StudyResult[P]]) -> None:
    """Do all runs that are wanted and not in `results`, which grows, and is written after each.

    Raises:
        UserError: a run failed in another way than by diverging; its log is named.
    """
    logs, points = study.folder_path / "logs", study.folder_path / "points"
    for folder in (logs, points):
        make_folder(folder)
    _forget_checkpoints(study, results)
    jobs, started, done_flops = side_by_side(study), time.monotonic(), 0.0
    running: _Running[P] = {}
    if study.pending_runs(losses(results)):
        print(f"{jobs} side by side; how each is getting on stands in {logs}", flush=True)
    with _ending(running):
        while True:
            todo = study.pending_runs(losses(results))
            for point in [one for one in todo if one not in running][: jobs - len(running)]:
                output = (logs / f"{point.name}.log").open("ab")
                running[point] = (_start(study, point, output), output)
            if not running:
                return
            point = _next_ended(running)
            process, log = running.pop(point)
            log.close()
            results[point] = read_run_result(study, point, process.returncode, logs / f"{point.name}.log")
            write_results(study, results)
            _forget_checkpoints(study, results)
            done_flops += total_flops(study, [point])
            left = total_flops(study, study.pending_runs(losses(results)))
            speed = done_flops / (time.monotonic() - started)
            _say(results[point], len(results), left / speed)


def _start(study: Study[P], point: P, log: IO[bytes]) -> subprocess.Popen:
    command = [sys.executable, "-m", "moonlight.cli", "pretrain", str(study.recipe_path), *study.overrides(point)]
    # A session of its own: Ctrl-C is for this command, which then lets its runs save.
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def _next_ended(running: _Running[P]) -> P:
    while True:
        for point, (process, _) in running.items():
            if process.poll() is not None:
                return point
        time.sleep(SECONDS_BETWEEN_LOOKS)


@contextlib.contextmanager
def _ending(running: _Running[P]) -> Iterator[None]:
    """However the block ends, let what still runs save and stop. SIGTERM ends the block."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(CODE_STOPPED)

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
        if running:
            print(f"letting {len(running)} runs save and stop", file=sys.stderr, flush=True)
        for process, _ in running.values():
            process.terminate()
        deadline = time.monotonic() + SECONDS_TO_SAVE
        for process, log in running.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.close()


def read_run_result(study: Study[P], point: P, code: int, log: Path) -> StudyResult[P]:
    """What a run that ended came to.

    Raises:
        UserError: it failed, and not because its loss was not finite any more.
    """
    config = study.make_config(point)
    folder = run_folder.run_path(config)
    entries = read_metrics(folder)
    why = divergence(entries, config)
    if not why and (code or not entries or "loss/held_out" not in entries[-1]):
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        raise UserError(f"run {point.name} failed with code {code}: {lines[-1][:300]} (all of it is in {log})")
    tokens = entries[-1]["consumed_tokens"]
    return StudyResult(
        point=point,
        diverged=why,
        loss=None if why else entries[-1]["loss/held_out"],
        steps=entries[-1]["step"],
        tokens=tokens,
        flops=tokens * train_flops_per_token(config.model, config.data.sequence_length),
        seconds=sum(entry["time/step_seconds"] for entry in entries),
        svd_entropy=_last_by_group(entries, "optim/svd_entropy/"),
        update_rms=_last_by_group(entries, "optim/update_rms/"),
        curve=[] if why else _curve(entries),
    )


def _last_by_group(entries: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    """What the last step that has such keys says, by what follows the prefix; without what is not finite."""
    for entry in reversed(entries):
        if found := {key.removeprefix(prefix): value for key, value in entry.items() if key.startswith(prefix)}:
            return {name: value for name, value in found.items() if math.isfinite(value)}
    return {}


def _curve(entries: list[dict[str, Any]]) -> list[list[float]]:
    """Tokens and the mean training loss up to there, in CURVE_POINTS parts; steps that were skipped are left out."""
    points, start = [], 0
    for number in range(1, CURVE_POINTS + 1):
        stop = number * len(entries) // CURVE_POINTS
        known = [loss for entry in entries[start:stop] if math.isfinite(loss := entry["loss/train"])]
        if known:
            points.append([entries[stop - 1]["consumed_tokens"], sum(known) / len(known)])
            start = stop
    return points


def divergence(entries: list[dict[str, Any]], config: RunConfig) -> str:
    """Why a run that ended counts as diverged; empty if it does not, or failed for another reason."""
    if not entries:
        return ""
    last, most = entries[-1], config.train.max_skipped_steps_in_a_row
    before = entries[-most - 1]["optim/skipped_steps"] if len(entries) > most else 0
    if last["step"] < RunSchedule(config).num_steps:
        in_a_row = last["optim/skipped_steps"] - before
        return f"no finite step in {most} up to step {last['step']}" if in_a_row >= most else ""
    loss = last.get("loss/held_out", 0.0)
    if not math.isfinite(loss):
        return "the loss is not finite"
    if loss >= math.log(config.model.vocab_size):
        return f"the loss, {loss:.3f}, is no better than guessing"
    return ""


def _forget_checkpoints(study: Study[P], results: dict[P, StudyResult[P]]) -> None:
    """Of runs whose results are kept, but for those that are still looked at: they are what takes space."""
    kept = study.runs_to_keep(losses(results))
    for point in results:
        for name in (".order", *["checkpoints"] * (point not in kept)):
            shutil.rmtree(study.folder_path / "points" / point.name / name, ignore_errors=True)


def _say(result: StudyResult[P], count: int, seconds_left: float) -> None:
    said = f"diverged, {result.diverged}" if result.diverged else f"held-out loss {result.loss:.4f}"
    left = f"at least {seconds_left / 60:.0f} min left" if seconds_left else "none left"
    print(f"{result.point.name}: {said} ({result.seconds:.0f} s of steps); {count} runs done, {left}", flush=True)
