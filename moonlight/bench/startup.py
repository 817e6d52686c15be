"""`moonlight bench startup`: seconds until a command answers, and until a training run has done its first step.

Every measurement is a process of its own, as a user's command is; the cases take turns, the page cache is warm. A run
of the quickstart, with the processes that its recipe says, counts from its start to the line that its first step leaves
in metrics.jsonl; its data are made by the project's own commands from modules of Python's standard library.
"""

import json
import math
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from moonlight.bench.report import against_bar, hardware, print_results, told_rounds
from moonlight.config.load import load_recipe
from moonlight.train.metrics import METRICS_FILE

HELP_BAR, HELP_AIM = 500.0, 300.0
"""Milliseconds."""
FIRST_STEP_BAR, FIRST_STEP_AIM = 15.0, 8.0
"""Seconds."""
HELPS = ("--help", "pretrain --help", "plan --help", "export --help")
CORPUS_BYTES = 1 << 20
SECONDS_BETWEEN_LOOKS = 0.005
MOONLIGHT = (sys.executable, "-m", "moonlight.cli")


def bench_startup(rounds: int, recipe: Path, json_path: Path | None = None) -> bool:
    """Measure, print the table, and return whether every gate and bar has passed."""
    config = load_recipe(recipe)
    helps: dict[str, list[float]] = {arguments: [] for arguments in HELPS}
    steps: list[float] = []
    losses = set()
    with tempfile.TemporaryDirectory(prefix="moonlight-bench-") as place:
        folder = Path(place)
        data, tokenizer = make_data(folder, config.model.vocab_size)
        for number in told_rounds(rounds):
            for arguments, times in helps.items():
                times.append(1e3 * _help_seconds(arguments))
            overrides = (f"name=round{number}", f"runs_folder={folder}", f"data.path={data}")
            seconds, loss = _first_step(
                folder / f"round{number}",
                [str(recipe), *overrides, f"data.tokenizer={tokenizer}", "train.stop_at_step=1"],
            )
            steps.append(seconds)
            losses.add(loss)
    same = len(losses) == 1 and all(map(math.isfinite, losses))
    # The first round warms the page cache.
    figures = [
        against_bar(f"moonlight {arguments}", times[1:], HELP_BAR, True, "ms", HELP_AIM)
        for arguments, times in helps.items()
    ]
    processes = config.parallel.num_processes
    case = f"first step of {recipe.stem}, {processes} processes"
    figures.append(against_bar(case, steps[1:], FIRST_STEP_BAR, same, "s", FIRST_STEP_AIM))
    notes = [
        "in the place of a peer: the bar; wall time from the start of the process",
        f"losses of the first steps: {'the same' if same else 'DIFFERENT, or not finite'}",
    ]
    return print_results("Startup", figures, hardware("cpu"), notes, json_path)


def make_data(folder: Path, vocab_size: int) -> tuple[Path, Path]:
    """Prepared data and their tokenizer, of about CORPUS_BYTES of text."""
    corpus, tokenizer, data = folder / "corpus", folder / "tokenizer", folder / "data"
    corpus.mkdir()
    size = 0
    for module in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if size < CORPUS_BYTES:
            shutil.copy(module, corpus)
            size += module.stat().st_size
    _run("tokenizer", "train", "--input", corpus, "--vocab-size", vocab_size, "--out", tokenizer)
    _run("data", "prepare", "--input", corpus, "--tokenizer", tokenizer, "--out", data, "--validation-share", 0.1)
    return data, tokenizer


def _run(*arguments: object) -> None:
    subprocess.run([*MOONLIGHT, *map(str, arguments)], check=True, capture_output=True)


def _help_seconds(arguments: str) -> float:
    start = time.perf_counter()
    shown = subprocess.run([*MOONLIGHT, *arguments.split()], check=True, capture_output=True, text=True).stdout
    seconds = time.perf_counter() - start
    if "Usage: moonlight" not in shown:
        raise RuntimeError(f"moonlight {arguments} printed no help: {shown[:200]}")
    return seconds


def _first_step(folder: Path, arguments: list[str]) -> tuple[float, float]:
    """Seconds until the run in `folder` has written down its first step, and the loss that it found."""
    start = time.perf_counter()
    with subprocess.Popen(
        [*MOONLIGHT, "pretrain", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        metrics = folder / METRICS_FILE
        while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        seconds = time.perf_counter() - start
        _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"moonlight pretrain {' '.join(arguments)} ended with {process.returncode}: {said}")
    return seconds, json.loads(metrics.read_text().splitlines()[0])["loss/train"]
