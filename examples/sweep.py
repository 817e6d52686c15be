"""Sweep of learning rates with Muon and AdamW: steps to a target, with stored results, a table and a plot."""

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
MAX_RATES = 12
BAR = 0.7
"""Largest accepted ratio of Muon's steps to AdamW's steps."""

Point = tuple[str, float, int]
"""Optimizer, learning rate, seed."""


@dataclass(frozen=True)
class Outcome:
    """Result of one run, which ends at the target or after its maximum number of steps."""

    steps: int | None
    """Steps to the target; None if the run did not reach it."""
    curve: list[tuple[int, float]]
    """(step, loss or error rate); lower is better."""
    seconds: float
    """Wall time."""


@dataclass(frozen=True)
class Task:
    """Task of a sweep. Outcomes depend only on `settings`, which are stored with the results, and on the point."""

    name: str
    measured: str
    target: float
    settings: dict[str, Any]
    train: Callable[..., Outcome]
    """Called as train(optimizer, rate, seed) in a separate process, so it must be picklable."""


def point_key(point: Point) -> str:
    """Return the key of a point in results.json."""
    optimizer, rate, seed = point
    return f"{optimizer} {rate:g} {seed}"


def sweep(task: Task, folder: Path, start: Sequence[float], seeds: Sequence[int], jobs: int) -> bool:
    """Run all points of the grid that `folder/results.json` lacks, then write a table and a plot.

    Args:
        start: initial learning rates; the grid grows until the best rate is not at an edge.
        jobs: number of concurrent runs.

    Returns:
        True if Muon needs at most BAR of AdamW's steps, each at its best rate, and neither is at the edge of the grid.

    Raises:
        UserError: the stored results have other settings, or cannot be read.
    """
    with folder_lock(folder):
        path = folder / "results.json"
        content: dict[str, Any] = {"task": task.name, "settings": task.settings, "points": {}}
        if path.exists():
            stored = read_json(path, ("task", "settings", "points"))
            for name in ("task", "settings"):
                if stored[name] != content[name]:
                    raise UserError(
                        f"{path} has results of {name} {stored[name]}, not of {content[name]}: give another --out"
                    )
            content = stored
        points = content["points"]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=_limit_threads, initargs=(jobs,)) as pool:
            running: dict[Future[Outcome], Point] = {}
            try:
                while True:
                    busy = set(running.values())
                    wanted = _wanted_points(points, start, seeds)
                    pending = [p for p in wanted if point_key(p) not in points and p not in busy]
                    for point in pending[: jobs - len(running)]:
                        running[pool.submit(task.train, *point)] = point
                    if not running:
                        break
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        point = running.pop(done)
                        outcome = done.result()
                        points[point_key(point)] = asdict(outcome)
                        write_json(path, content)
                        result = f"{outcome.steps} steps" if outcome.steps else f"not in {outcome.curve[-1][0]} steps"
                        print(f"{point_key(point)}: {result}, {outcome.seconds:.0f} s", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        text, passed = describe(task, points, seeds)
        atomic_write_text(folder / "results.md", text)
        draw(task, points, seeds, folder / "results.png")
        print(f"\n{text}\n{folder}: results.json, results.md, results.png")
        return passed


def _limit_threads(jobs: int) -> None:
    if jobs > 1:
        torch.set_num_threads(1)


def _rates(points: dict[str, Any], seeds: Sequence[int]) -> dict[str, dict[float, list[dict[str, Any]]]]:
    """Return the runs of all seeds, by optimizer and rate; skip rates with a missing seed."""
    table: dict[str, dict[float, list[dict[str, Any]]]] = {name: {} for name in OPTIMIZERS}
    for optimizer, rate in {(key.split()[0], float(key.split()[1])) for key in points}:
        runs = [points[key] for seed in seeds if (key := point_key((optimizer, rate, seed))) in points]
        if len(runs) == len(seeds):
            table[optimizer][rate] = runs
    return table


def _cost(runs: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Return the cost of a rate: mean steps to the target, infinite if a seed missed it; then the mean last result."""
    steps = [float("inf") if run["steps"] is None else run["steps"] for run in runs]
    last = [run["curve"][-1][1] for run in runs]
    return statistics.fmean(steps), statistics.fmean(last) if all(x == x for x in last) else float("inf")


def _wanted_points(points: dict[str, Any], start: Sequence[float], seeds: Sequence[int]) -> list[Point]:
    """Return the points of the grid, extended as far as the results so far require."""
    values = {
        name: {rate: _cost(runs) for rate, runs in by_rate.items()} for name, by_rate in _rates(points, seeds).items()
    }
    rates = pending_rates(start, FACTOR, MAX_RATES, values)
    return [(name, rate, seed) for rate in rates for name in OPTIMIZERS for seed in seeds]


def describe(task: Task, points: dict[str, Any], seeds: Sequence[int]) -> tuple[str, bool]:
    """Return the grid as a Markdown table with its conclusion, and True if Muon meets BAR."""
    table = _rates(points, seeds)
    lines = [f"Steps to {task.measured} {task.target:g}, seeds {', '.join(map(str, seeds))}\n"]
    lines += ["| learning rate | muon | mean | adamw | mean |", "|---|---|---|---|---|"]
    values = {name: {rate: _cost(runs) for rate, runs in table[name].items()} for name in OPTIMIZERS}
    best = {name: best_rate(values[name]) for name in OPTIMIZERS}
    for rate in sorted(set().union(*table.values())):
        cells = [f"{rate:g}"]
        for name in OPTIMIZERS:
            runs = table[name].get(rate, [])
            mean = _cost(runs)[0] if runs else float("nan")
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
        f"{means['adamw']:.1f} at {best['adamw']:g}); the limit is {BAR}: {'met' if passed else 'NOT met'}."
    )
    return "\n".join(lines), passed


def draw(task: Task, points: dict[str, Any], seeds: Sequence[int], out: Path) -> None:
    """Plot the steps over the learning rate, and the curves at the best rates."""
    figure, (left, right) = new_figure(2)
    from matplotlib.ticker import LogLocator, NullLocator

    for name, by_rate in _rates(points, seeds).items():
        color, label = COLORS[name], LABELS[name]
        reached = {rate: _cost(runs)[0] for rate, runs in sorted(by_rate.items()) if _cost(runs)[0] < float("inf")}
        if reached:
            left.plot(list(reached), list(reached.values()), color=color, marker="o", markersize=4, label=label)
        for rate in reached:
            left.plot([rate] * len(by_rate[rate]), [run["steps"] for run in by_rate[rate]], ".", color=color, alpha=0.4)
        best = best_rate({rate: _cost(runs) for rate, runs in by_rate.items()})
        for index, run in enumerate(by_rate[best]):
            text = f"{label}, learning rate {best:g}" if index == 0 else None
            right.plot(*zip(*run["curve"], strict=True), color=color, linewidth=1, label=text)
    mark_rates(left, {rate for by_rate in _rates(points, seeds).values() for rate in by_rate})
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
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every sweep."""
    parser.add_argument("--rates", help="initial learning rates, such as 0.005,0.01,0.02")
    parser.add_argument("--seeds", type=int, default=3, help="runs per point; default: 3")
    parser.add_argument("--jobs", type=int, default=0, help="concurrent runs; default: one per core, 1 on a GPU")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="folder for results; default: runs/examples/<name>")
    parser.add_argument("--debug", action="store_true", help="print the full traceback of an error")


def check_options(options: argparse.Namespace) -> None:
    """Raise UserError for an invalid option."""
    for name, minimum in (("seeds", 1), ("jobs", 0)):
        if getattr(options, name) < minimum:
            raise UserError(f"--{name} is {getattr(options, name)}: it must be at least {minimum}")
    if options.rates is not None:
        positive_rates(options.rates)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda: this machine has no CUDA device; use cpu")


def run(task: Task, options: argparse.Namespace, rates: str, name: str) -> NoReturn:
    """Run a sweep, by default from `rates` and into runs/examples/`name`; exit with code 1 if Muon misses BAR."""
    jobs = options.jobs or (1 if options.device == "cuda" else cores())
    out = options.out or Path("runs/examples") / name
    sys.exit(0 if sweep(task, out, positive_rates(options.rates or rates), range(1, options.seeds + 1), jobs) else 1)


def positive_rates(text: str) -> list[float]:
    """Parse learning rates such as "0.005,0.01,0.02"; raise UserError if one is not above 0."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise UserError(f"--rates is {text!r}: it must be numbers above 0 separated by commas, such as 0.01,0.02")
    return rates
