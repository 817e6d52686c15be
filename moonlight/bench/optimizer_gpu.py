"""GPU part of `moonlight bench optimizer`: the symmetric product, then full optimizer steps compared with peers.

The cases of a product take turns in every round. Optimizers of 768 matrices are too large for that. Each is built,
timed and freed before the next, so one GPU with 80 GB is enough (six copies of the weights, 53 GB, and their
workspaces).
"""

import contextlib
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from moonlight.bench.peers import (
    PEERS,
    WEIGHT_TOLERANCE,
    OptimizerAndParams,
    build_ours,
    distance,
    interleaved,
    milliseconds,
    random_matrix,
    random_stacks,
    set_gradients,
    stack_weights,
)
from moonlight.bench.report import BenchResult, time_ratio
from moonlight.optim import newton_schulz
from moonlight.optim.newton_schulz import COEFFICIENTS, orthogonalize

PRODUCT_SHAPE = (32, 1408, 2048)
PRODUCT_BAR = 480
"""TFLOP/s, counting only the computed tiles."""
STEP_BARS = {"batched cuBLAS": 1.2, "torch.optim.Muon": 1.5, "muon-optimizer 0.1.0": 1.5}
GRAM_BAR = 0.9
TILINGS = ((128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 32, 4, 5), (128, 128, 8, 2), (64, 64, 4, 4))
"""(side, depth, warps, stages) of each measured tiling; the optimizer uses the first."""


def gpu_results(rounds: int, is_accurate: bool) -> tuple[list[BenchResult], list[str]]:
    """Return all results and notes. `is_accurate`: the accuracy gate passed."""
    results, notes = product_results(rounds, "cuda", PRODUCT_SHAPE)
    if importlib.util.find_spec("gram_newton_schulz"):
        results.append(_gram_newton_schulz(rounds, is_accurate))
    else:
        notes.append("gram-newton-schulz: skipped, not installed")
    results += step_results(rounds, "cuda", is_accurate, stacks=3, count=256, rows=2048, columns=1408)
    return results, [*notes, "steps: one optimizer after the other, not in turns"]


def product_results(rounds: int, device: str, shape: tuple[int, int, int]) -> tuple[list[BenchResult], list[str]]:
    """Compare X X^T of float16 X [count, n, k] with torch.bmm, and list the rates of all TILINGS."""
    from moonlight.kernels.symmetric import Tiling, symmetric_product

    count, n, k = shape
    x = torch.randn(shape, device=device).half()
    out, reference = x.new_empty(2, count, n, n)
    tilings = [Tiling(side, depth, num_warps=warps, num_stages=stages) for side, depth, warps, stages in TILINGS]
    cases: list[Callable[[], Any]] = [lambda: torch.bmm(x, x.mT, out=reference)]
    cases += [partial(symmetric_product, x, x.mT, out, tiling=tiling) for tiling in tilings]
    cublas, *ours = interleaved(rounds, device, cases)
    symmetric_product(x, x.mT, out)
    # The sums have different orders: float32 rounding of k terms, and one float16 rounding of each result.
    is_correct = torch.allclose(out.float(), reference.float(), rtol=2**-9, atol=2**-9 * k**0.5) and out.equal(out.mT)

    def rate(times: list[float], tiles: float) -> float:
        return 2 * count * tiles * k / (1e9 * statistics.median(times))

    rates = []
    for tiling, times in zip(tilings, ours, strict=True):
        rows = -(-n // tiling.side)
        rates.append(rate(times, rows * (rows + 1) / 2 * tiling.side**2))
    case = f"symmetric product {count}x{n}x{k}, torch.bmm"
    result = time_ratio(case, ours[0], cublas, 1.0, is_correct)
    result = replace(result, unit="TFLOP/s", ours=rates[0], peer=rate(cublas, n * n), bar=f">= {PRODUCT_BAR} TFLOP/s")
    result = replace(result, passed=is_correct and rates[0] >= PRODUCT_BAR)
    notes = [
        f"symmetric product, tiles {t.side} x {t.depth}, {t.num_warps} warps, {t.num_stages} stages: {r:.0f} TFLOP/s"
        for t, r in zip(tilings, rates, strict=True)
    ]
    return [result], notes


def _gram_newton_schulz(rounds: int, is_accurate: bool) -> BenchResult:
    """Compare Newton-Schulz of a batch with the package gram-newton-schulz, configured as in its README."""
    from gram_newton_schulz import GramNewtonSchulz

    matrices = torch.stack(
        [random_matrix("gauss", *PRODUCT_SHAPE[1:], "cuda", seed) for seed in range(PRODUCT_SHAPE[0])]
    )
    steps = [list(COEFFICIENTS["moonlight"][1])] * 5
    peer_call = GramNewtonSchulz(ns_coefficients=steps, gram_newton_schulz_reset_iterations=[2])
    cases = [lambda: orthogonalize(matrices, 5, "moonlight", torch.bfloat16), lambda: peer_call(matrices)]
    ours, peer = interleaved(rounds, "cuda", cases)
    return time_ratio("Newton-Schulz 32x1408x2048, gram-newton-schulz", ours, peer, GRAM_BAR, is_accurate)


def step_results(
    rounds: int, device: str, is_accurate: bool, *, stacks: int, count: int, rows: int, columns: int
) -> list[BenchResult]:
    """Time full steps on the matrices of `random_stacks`, one optimizer after the other."""
    weights, gradients = random_stacks(device, stacks, count, rows, columns)
    ours, our_weights = _time_steps(rounds, device, build_ours, weights, gradients)
    movement = distance(weights, our_weights)
    results = []
    for name, build in {"batched cuBLAS": build_ours, **PEERS}.items():
        with _without_symmetry() if name == "batched cuBLAS" else contextlib.nullcontext():
            times, peer_weights = _time_steps(rounds, device, build, weights, gradients)
        apart = distance(our_weights, peer_weights) / movement
        case = f"step {stacks * count}x{rows}x{columns}, {name}"
        result = time_ratio(case, ours, times, STEP_BARS[name], is_accurate and apart <= WEIGHT_TOLERANCE)
        results.append(replace(result, weights_apart=apart))
        del peer_weights
    return results


@contextlib.contextmanager
def _without_symmetry() -> Iterator[None]:
    """Run Newton-Schulz in batches with torch.bmm, without symmetric products. Element-wise passes stay the same."""
    before = newton_schulz.GRAM_FROM_SIDE
    newton_schulz.GRAM_FROM_SIDE = sys.maxsize
    try:
        yield
    finally:
        newton_schulz.GRAM_FROM_SIDE = before


def _time_steps(
    rounds: int,
    device: str,
    build: Callable[[list[torch.Tensor]], OptimizerAndParams],
    weights: list[torch.Tensor],
    gradients: list[torch.Tensor],
) -> tuple[list[float], list[torch.Tensor]]:
    """Return milliseconds of every step except the first, and the final weights by stack. Free everything else."""
    optimizer, parameters = build(weights)
    times = []
    for _ in range(rounds + 1):
        set_gradients(parameters, gradients)
        times.append(milliseconds(optimizer.step, device))
    optimizer.zero_grad()
    optimizer.state.clear()
    final_weights = stack_weights(parameters)
    if device == "cuda":
        torch.cuda.empty_cache()
    return times[1:], final_weights
