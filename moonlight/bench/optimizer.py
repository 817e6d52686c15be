"""`moonlight bench optimizer`: accuracy and speed of Muon, compared with a plain loop and other optimizers.

The gate: a speed result counts only if all accuracy results passed. The cases of one result take turns in every round.
On a CPU the time is that of the one computing thread, so other processes on the machine have little effect.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moonlight.bench.optimizer_gpu import gpu_results
from moonlight.bench.peers import (
    PEERS,
    WEIGHT_TOLERANCE,
    build_ours,
    distance,
    interleaved,
    random_matrix,
    random_stacks,
    set_gradients,
    stack_weights,
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
"""Minimum error of the plain loop over ours: 2% tolerance, because batched products may sum in another order."""


def plain_loop(matrix: torch.Tensor, dtype: torch.dtype, num_steps: int = 5, name: str = "moonlight") -> torch.Tensor:
    """Orthogonalize one matrix [rows, columns] in `dtype`, as other optimizers do, with torch.optim.Muon's rounding."""
    first, repeated = COEFFICIENTS[name]
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / (x.norm() + 1e-7)).to(dtype)
    for step in range(num_steps):
        a, b, c = first[step] if step < len(first) else repeated
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def bench_optimizer(rounds: int, device: str, json_path: Path | None = None) -> bool:
    """Run the benchmark on `device` ("cpu" or "cuda"), print its table, and return whether every result passed.

    Raises:
        UserError: the device is unknown or missing, or muon-optimizer is not installed.
    """
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
        results = [
            _accuracy(rows, columns, spectrum, device) for rows, columns in ACCURACY_SHAPES for spectrum in SPECTRA
        ]
        is_accurate = all(result.passed for result in results)
        notes: list[str] = []
        if device == "cpu":
            results += _steps(rounds, device, is_accurate, stacks=12, count=64, rows=64, columns=44)
            results += [_newton_schulz(rounds, rows, columns, device, is_accurate) for rows, columns in SPEED_SHAPES]
        else:
            gpu_measured, notes = gpu_results(rounds, is_accurate)
            results += gpu_measured
    finally:
        torch.set_num_threads(threads)
    notes += [
        f"{result.case}: weights differ by {result.weights_apart:.4f} of their movement (at most {WEIGHT_TOLERANCE})"
        for result in results
        if result.weights_apart is not None
    ]
    return print_results("Muon: accuracy, then speed", results, machine, notes, json_path)


def _accuracy(rows: int, columns: int, spectrum: str, device: str) -> BenchResult:
    """Compare the relative errors of ours and of the plain bfloat16 loop to the same iteration in float32."""
    matrix = random_matrix(spectrum, rows, columns, device)
    reference = plain_loop(matrix, torch.float32)
    errors = []
    for result in (orthogonalize(matrix, 5, "moonlight", torch.bfloat16), plain_loop(matrix, torch.bfloat16)):
        errors.append(((result.float() - reference).norm() / reference.norm()).item())
    ours, peer = errors
    case, passed = f"error {rows}x{columns}, {spectrum}", peer >= ACCURACY_BAR * ours
    return BenchResult(case, "", ours, peer, peer / ours, "", f">= {ACCURACY_BAR}", passed)


def _newton_schulz(rounds: int, rows: int, columns: int, device: str, is_accurate: bool) -> BenchResult:
    matrix = random_matrix("gauss", rows, columns, device)
    cases = [lambda: orthogonalize(matrix, 5, "moonlight", torch.bfloat16), lambda: plain_loop(matrix, torch.bfloat16)]
    ours, peer = interleaved(rounds, device, cases)
    return time_ratio(f"Newton-Schulz {rows}x{columns}, plain loop", ours, peer, NEWTON_SCHULZ_BAR, is_accurate)


def _steps(
    rounds: int, device: str, is_accurate: bool, *, stacks: int, count: int, rows: int, columns: int
) -> list[BenchResult]:
    """Time full steps of all optimizers in turns, on the matrices of `random_stacks`."""
    weights, gradients = random_stacks(device, stacks, count, rows, columns)
    optimizers = {"ours": build_ours(weights), **{name: build(weights) for name, build in PEERS.items()}}

    def reset_gradients() -> None:
        for _, parameters in optimizers.values():
            set_gradients(parameters, gradients)

    steps: list[Callable[[], Any]] = [optimizer.step for optimizer, _ in optimizers.values()]
    times = interleaved(rounds, device, steps, before=reset_gradients)
    our_weights = stack_weights(optimizers["ours"][1])
    movement = distance(weights, our_weights)
    results = []
    for name, peer in zip(PEERS, times[1:], strict=True):
        apart = distance(our_weights, stack_weights(optimizers[name][1])) / movement
        case = f"step {stacks * count}x{rows}x{columns}, {name}"
        result = time_ratio(case, times[0], peer, STEP_BAR, is_accurate and apart <= WEIGHT_TOLERANCE)
        results.append(replace(result, weights_apart=apart))
    return results
