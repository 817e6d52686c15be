"""`moonlight bench optimizer`: is Muon's arithmetic as exact as the plain loop, and how much faster is it?

Accuracy comes first: a figure of speed counts only if its gate has passed. Cases of one figure take turns in every
round. On a CPU the time is that of the one computing thread, so neighbours on the machine matter little.
"""

import importlib.metadata
from dataclasses import replace
from pathlib import Path

import torch

from moonlight.bench.optimizer_gpu import gpu_figures
from moonlight.bench.peers import (
    PEERS,
    WEIGHT_TOLERANCE,
    distance,
    draw_stacks,
    give_gradients,
    interleaved,
    make_ours,
    random_matrix,
    stacked,
)
from moonlight.bench.report import BenchResult, hardware, print_results, time_ratio
from moonlight.errors import UserError
from moonlight.optim.newton_schulz import COEFFICIENTS, orthogonalize

PEER = "muon-optimizer==0.1.0"
SPECTRA = ("gauss", "power law", "four decades")
SPEED_SHAPES = ((1408, 2048), (11264, 2048))
ACCURACY_SHAPES = ((64, 44), (704, 1024), (2816, 512), *SPEED_SHAPES)
NEWTON_SCHULZ_BAR = 1.2
STEP_BAR = 10.0
ACCURACY_BAR = 0.98
"""Least error of the plain loop over ours: 2% for chance, since batched products may sum in another order."""


def plain_loop(matrix: torch.Tensor, dtype: torch.dtype, num_steps: int = 5, name: str = "moonlight") -> torch.Tensor:
    """The iteration on one matrix as the other optimizers write it, its sums rounded once like torch.optim.Muon's."""
    first, then = COEFFICIENTS[name]
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / (x.norm() + 1e-7)).to(dtype)
    for step in range(num_steps):
        a, b, c = first[step] if step < len(first) else then
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def bench_optimizer(rounds: int, device: str, json_path: Path | None = None) -> bool:
    """Measure, print the table, and return whether every gate and bar has passed."""
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device is {device}: it must be cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda: this machine has no CUDA device; use cpu")
    try:
        importlib.metadata.version("muon-optimizer")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the peer {PEER} is missing: python -m pip install --no-deps {PEER}") from None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        machine = hardware(device)
        figures = [
            _accuracy(rows, columns, spectrum, device) for rows, columns in ACCURACY_SHAPES for spectrum in SPECTRA
        ]
        exact = all(figure.passed for figure in figures)
        notes: list[str] = []
        if device == "cpu":
            figures += _steps(rounds, device, exact, stacks=12, count=64, rows=64, columns=44)
            figures += [_newton_schulz(rounds, rows, columns, device, exact) for rows, columns in SPEED_SHAPES]
        else:
            measured, notes = gpu_figures(rounds, exact)
            figures += measured
    finally:
        torch.set_num_threads(threads)
    notes += [
        f"{figure.case}: weights differ by {figure.weights_apart:.4f} of the way gone (at most {WEIGHT_TOLERANCE})"
        for figure in figures
        if figure.weights_apart is not None
    ]
    return print_results("Muon: accuracy, then speed", figures, machine, notes, json_path)


def _accuracy(rows: int, columns: int, spectrum: str, device: str) -> BenchResult:
    """Relative error of ours and of the plain bfloat16 loop to the same iteration in float32."""
    whole = random_matrix(spectrum, rows, columns, device)
    exact = plain_loop(whole, torch.float32)
    errors = []
    for result in (orthogonalize(whole, 5, "moonlight", torch.bfloat16), plain_loop(whole, torch.bfloat16)):
        errors.append(((result.float() - exact).norm() / exact.norm()).item())
    ours, peer = errors
    return BenchResult(
        f"error {rows}x{columns}, {spectrum}",
        "",
        ours,
        peer,
        peer / ours,
        "",
        f">= {ACCURACY_BAR}",
        peer >= ACCURACY_BAR * ours,
    )


def _newton_schulz(rounds: int, rows: int, columns: int, device: str, exact: bool) -> BenchResult:
    whole = random_matrix("gauss", rows, columns, device)
    ours, peer = interleaved(
        rounds,
        device,
        [
            lambda: orthogonalize(whole, 5, "moonlight", torch.bfloat16),
            lambda: plain_loop(whole, torch.bfloat16),
        ],
    )
    return time_ratio(f"Newton-Schulz {rows}x{columns}, plain loop", ours, peer, NEWTON_SCHULZ_BAR, exact)


def _steps(
    rounds: int, device: str, exact: bool, *, stacks: int, count: int, rows: int, columns: int
) -> list[BenchResult]:
    """Whole steps of all optimizers in turns, on `draw_stacks`."""
    weights, gradients = draw_stacks(device, stacks, count, rows, columns)
    made = {"ours": make_ours(weights), **{name: make(weights) for name, make in PEERS.items()}}

    def give() -> None:
        for _, parameters in made.values():
            give_gradients(parameters, gradients)

    times = interleaved(rounds, device, [optimizer.step for optimizer, _ in made.values()], before=give)
    own = stacked(made["ours"][1])
    moved = distance(weights, own)
    figures = []
    for name, peer in zip(PEERS, times[1:], strict=True):
        apart = distance(own, stacked(made[name][1])) / moved
        case = f"step {stacks * count}x{rows}x{columns}, {name}"
        figure = time_ratio(case, times[0], peer, STEP_BAR, exact and apart <= WEIGHT_TOLERANCE)
        figures.append(replace(figure, weights_apart=apart))
    return figures
