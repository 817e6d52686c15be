"""Steps that Muon and AdamW need to a target, over one grid of learning rates: run, kept, printed, drawn."""

import argparse
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from moonlight.errors import UserError
from moonlight.files import atomic_write_text, folder_lock, read_json, write_figure, write_json
from moonlight.studies.grid import best_rate, on_edge, pending_rates
from moonlight.studies.scaling_picture import COLORS, LABELS, mark_rates, new_figure

OPTIMIZERS = ("muon", "adamw")
FACTOR = 2.0
MOST_RATES = 12
BAR = 0.7
"""Most of AdamW's steps that Muon is expected to need."""

Point = tuple[str, float, int]
"""Optimizer, learning rate, seed."""


@dataclass(frozen=True)
class Outcome:
    """One run, which ends at the target or after the most steps."""

    steps: int | None
    """Until the target was reached; None if it was not."""
    curve: list[tuple[int, float]]
    """What was measured, loss or share of errors, by step; less is better."""
    seconds: float


@dataclass(frozen=True)
class Task:
    """What is swept. `settings` are all that decide an outcome besides the point: they are kept with the results."""

    name: str
    measured: str
    target: float
    settings: dict[str, Any]
    train: Callable[..., Outcome]
    """Called as train(optimizer, rate, seed) in a process of its own, so it must be possible to pickle it."""


def key_of(point: Point) -> str:
    optimizer, rate, seed = point
    return f"{optimizer} {rate:g} {seed}"


def sweep(task: Task, folder: Path, start: Sequence[float], seeds: Sequence[int], jobs: int) -> bool:
    """Run every point that the grid wants and that `folder/results.json` lacks; table, picture and verdict follow.

    Returns:
        Whether Muon needs at most BAR of AdamW's steps, each at its best rate, neither at the edge of the grid.

    Raises:
        UserError: the results there are of other settings, or cannot be read.
    """
    with folder_lock(folder):
        path = folder / "results.json"
        content: dict[str, Any] = {"task": task.name, "settings": task.settings, "points": {}}
        if path.exists():
            there = read_json(path, ("task", "settings", "points"))
            for name in ("task", "settings"):
                if there[name] != content[name]:
                    raise UserError(
                        f"{path} has results of {name} {there[name]}, now it is {content[name]}: give another --out"
                    )
            content = there
        points = content["points"]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread, initargs=(jobs,)) as pool:
            running: dict[Future[Outcome], Point] = {}
            try:
                while True:
                    busy = set(running.values())
                    todo = [p for p in _wanted(points, start, seeds) if key_of(p) not in points and p not in busy]
                    for point in todo[: jobs - len(running)]:
                        running[pool.submit(task.train, *point)] = point
                    if not running:
                        break
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        point = running.pop(done)
                        outcome = done.result()
                        points[key_of(point)] = asdict(outcome)
                        write_json(path, content)
                        said = f"{outcome.steps} steps" if outcome.steps else f"not in {outcome.curve[-1][0]} steps"
                        print(f"{key_of(point)}: {said}, {outcome.seconds:.0f} s", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        text, passed = describe(task, points, seeds)
        atomic_write_text(folder / "results.md", text)
        draw(task, points, seeds, folder / "results.png")
        print(f"\n{text}\n{folder}: results.json, results.md, results.png")
        return passed


def _one_thread(jobs: int) -> None:
    if jobs > 1:
        torch.set_num_threads(1)


def _rates(points: dict[str, Any], seeds: Sequence[int]) -> dict[str, dict[float, list[dict[str, Any]]]]:
    """By optimizer and rate, the runs of all seeds, where all are there."""
    table: dict[str, dict[float, list[dict[str, Any]]]] = {name: {} for name in OPTIMIZERS}
    for optimizer, rate in {(key.split()[0], float(key.split()[1])) for key in points}:
        runs = [points[key] for seed in seeds if (key := key_of((optimizer, rate, seed))) in points]
        if len(runs) == len(seeds):
            table[optimizer][rate] = runs
    return table


def _value(runs: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """How bad a rate is: mean steps to the target, infinite if a seed missed it; then the mean of what was measured."""
    steps = [float("inf") if run["steps"] is None else run["steps"] for run in runs]
    last = [run["curve"][-1][1] for run in runs]
    return statistics.fmean(steps), statistics.fmean(last) if all(x == x for x in last) else float("inf")


def _wanted(points: dict[str, Any], start: Sequence[float], seeds: Sequence[int]) -> list[Point]:
    values = {name: {rate: _value(runs) for rate, runs in own.items()} for name, own in _rates(points, seeds).items()}
    rates = pending_rates(start, FACTOR, MOST_RATES, values)
    return [(name, rate, seed) for rate in rates for name in OPTIMIZERS for seed in seeds]


def describe(task: Task, points: dict[str, Any], seeds: Sequence[int]) -> tuple[str, bool]:
    """The whole grid as a Markdown table with what it says, and whether the bar is met."""
    table = _rates(points, seeds)
    lines = [f"Steps to {task.measured} {task.target:g}, seeds {', '.join(map(str, seeds))}\n"]
    lines += ["| learning rate | muon | mean | adamw | mean |", "|---|---|---|---|---|"]
    values = {name: {rate: _value(runs) for rate, runs in table[name].items()} for name in OPTIMIZERS}
    best = {name: best_rate(values[name]) for name in OPTIMIZERS}
    for rate in sorted(set().union(*table.values())):
        cells = [f"{rate:g}"]
        for name in OPTIMIZERS:
            runs = table[name].get(rate, [])
            mean = _value(runs)[0] if runs else float("nan")
            text = "not reached" if mean == float("inf") else f"{mean:.1f}"
            cells.append(" ".join(str(run["steps"] or "-") for run in runs))
            cells.append(f"**{text}**" if rate == best[name] else text)
        lines.append("| " + " | ".join(cells) + " |")
    means = {name: values[name][best[name]][0] for name in OPTIMIZERS}
    edges = {name: edge for name in OPTIMIZERS if (edge := on_edge(values[name]))}
    lines.append("")
    for name, edge in edges.items():
        lines.append(f"{name} is best at the {edge} edge of the grid, {best[name]:g}: not yet an optimum.")
    if missed := [name for name in OPTIMIZERS if means[name] == float("inf")]:
        lines.append(f"{' and '.join(missed)} did not reach the target at any rate with every seed: no ratio.")
        return "\n".join(lines), False
    ratio = means["muon"] / means["adamw"]
    passed = ratio <= BAR and not edges
    lines.append(
        f"Muon needs {ratio:.2f} of tuned AdamW's steps ({means['muon']:.1f} at {best['muon']:g}, "
        f"{means['adamw']:.1f} at {best['adamw']:g}); at most {BAR} was expected: {'met' if passed else 'NOT met'}."
    )
    return "\n".join(lines), passed


def draw(task: Task, points: dict[str, Any], seeds: Sequence[int], out: Path) -> None:
    """Steps over learning rate, and the curves at the best rates."""
    figure, (left, right) = new_figure(2)
    from matplotlib.ticker import LogLocator, NullLocator

    for name, own in _rates(points, seeds).items():
        color, label = COLORS[name], LABELS[name]
        reached = {rate: _value(runs)[0] for rate, runs in sorted(own.items()) if _value(runs)[0] < float("inf")}
        if reached:
            left.plot(list(reached), list(reached.values()), color=color, marker="o", markersize=4, label=label)
        for rate in reached:
            left.plot([rate] * len(own[rate]), [run["steps"] for run in own[rate]], ".", color=color, alpha=0.4)
        best = best_rate({rate: _value(runs) for rate, runs in own.items()})
        for index, run in enumerate(own[best]):
            text = f"{label}, learning rate {best:g}" if index == 0 else None
            right.plot(*zip(*run["curve"], strict=True), color=color, linewidth=1, label=text)
    mark_rates(left, {rate for own in _rates(points, seeds).values() for rate in own})
    left.set_ylabel(f"steps to {task.measured} {task.target:g}")
    right.axhline(task.target, color="#555555", linewidth=0.8, linestyle="--")
    right.set(xlabel="step", ylabel=task.measured, yscale="log")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
    right.yaxis.set_minor_locator(NullLocator())
    right.yaxis.set_major_formatter("{x:g}")
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.suptitle(f"{task.name}, seeds {', '.join(map(str, seeds))}")
    write_figure(out, figure)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every sweep can be told."""
    parser.add_argument("--rates", help="learning rates to begin with, such as 0.005,0.01,0.02")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each point; by default 3")
    parser.add_argument("--jobs", type=int, default=0, help="runs side by side; 0: as many as cores, 1 on a GPU")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="folder for results; by default runs/examples/<name>")
    parser.add_argument("--debug", action="store_true", help="print the whole traceback of an error")


def check_options(given: argparse.Namespace) -> None:
    """Raise UserError for what no sweep can use, before any work."""
    for name, least in (("seeds", 1), ("jobs", 0)):
        if getattr(given, name) < least:
            raise UserError(f"--{name} is {getattr(given, name)}: it must be at least {least}")
    if given.rates is not None:
        positive_rates(given.rates)
    if given.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda: this machine has no CUDA device; use cpu")


def run(task: Task, given: argparse.Namespace, rates: str, name: str) -> NoReturn:
    """Sweep as the options say, from `rates` and into runs/examples/`name` if they do not say; exit 1 below the bar."""
    jobs = given.jobs or (1 if given.device == "cuda" else cores())
    out = given.out or Path("runs/examples") / name
    sys.exit(0 if sweep(task, out, positive_rates(given.rates or rates), range(1, given.seeds + 1), jobs) else 1)


def positive_rates(text: str) -> list[float]:
    """Learning rates of a command line, such as "0.005,0.01,0.02"."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise UserError(f"--rates is {text!r}: it must be numbers above 0 with commas between them, such as 0.01,0.02")
    return rates
