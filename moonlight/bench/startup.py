"""`moonlight bench startup`: seconds until a command prints its help, and until a training run finishes its first step.

Each measurement runs in a fresh process, like a user's command. The cases take turns, and the page cache is warm. The
first step is measured from the start of a quickstart run, with the recipe's number of processes, to the first line of
metrics.jsonl. The project's commands prepare its data from modules of Python's standard library.
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

from moonlight.bench.report import against_bar, hardware, iter_rounds, print_results
from moonlight.config.load import load_recipe
from moonlight.train.metrics import METRICS_FILE

HELP_BAR, HELP_AIM = 500.0, 300.0
"""Milliseconds of a `--help` command."""
FIRST_STEP_BAR, FIRST_STEP_AIM = 15.0, 8.0
"""Seconds to the first step."""
HELP_COMMANDS = ("--help", "pretrain --help", "plan --help", "export --help")
CORPUS_BYTES = 1 << 20
POLL_SECONDS = 0.005
MOONLIGHT = (sys.executable, "-m", "moonlight.cli")


def bench_startup(rounds: int, recipe: Path, json_path: Path | None = None) -> bool:
    """Run the benchmark, print its table, and return whether every result passed."""
    config = load_recipe(recipe)
    help_times: dict[str, list[float]] = {arguments: [] for arguments in HELP_COMMANDS}
    step_times: list[float] = []
    losses = set()
    with tempfile.TemporaryDirectory(prefix="moonlight-bench-") as temporary_folder:
        folder = Path(temporary_folder)
        data, tokenizer = make_data(folder, config.model.vocab_size)
        for round_index in iter_rounds(rounds):
            for arguments, times in help_times.items():
                times.append(1e3 * _help_seconds(arguments))
            overrides = (f"name=round{round_index}", f"runs_folder={folder}", f"data.path={data}")
            seconds, loss = _first_step(
                folder / f"round{round_index}",
                [str(recipe), *overrides, f"data.tokenizer={tokenizer}", "train.stop_at_step=1"],
            )
            step_times.append(seconds)
            losses.add(loss)
    same = len(losses) == 1 and all(map(math.isfinite, losses))
    # The first round warms the page cache.
    results = [
        against_bar(f"moonlight {arguments}", times[1:], HELP_BAR, True, "ms", HELP_AIM)
        for arguments, times in help_times.items()
    ]
    processes = config.parallel.num_processes
    case = f"first step of {recipe.stem}, {processes} processes"
    results.append(against_bar(case, step_times[1:], FIRST_STEP_BAR, same, "s", FIRST_STEP_AIM))
    notes = [
        "peer: the bar; times are wall time from the start of the process",
        f"losses of the first steps: {'the same' if same else 'DIFFERENT, or not finite'}",
    ]
    return print_results("Startup", results, hardware("cpu"), notes, json_path)


def make_data(folder: Path, vocab_size: int) -> tuple[Path, Path]:
    """Prepare a tokenizer and data from about CORPUS_BYTES of text, and return the paths (data, tokenizer)."""
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
    output = subprocess.run([*MOONLIGHT, *arguments.split()], check=True, capture_output=True, text=True).stdout
    seconds = time.perf_counter() - start
    if "Usage: moonlight" not in output:
        raise RuntimeError(f"moonlight {arguments} printed no help: {output[:200]}")
    return seconds


def _first_step(folder: Path, arguments: list[str]) -> tuple[float, float]:
    """Train one step and return the seconds until metrics.jsonl in `folder` has a line, and the training loss."""
    start = time.perf_counter()
    with subprocess.Popen(
        [*MOONLIGHT, "pretrain", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        metrics = folder / METRICS_FILE
        while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - start
        _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(
            f"moonlight pretrain {' '.join(arguments)} failed with exit code {process.returncode}: {errors}"
        )
    return seconds, json.loads(metrics.read_text().splitlines()[0])["loss/train"]
