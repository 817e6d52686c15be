"""What `moonlight bench optimizer --device cuda` measures: the symmetric product, then whole steps beside peers.

Cases of a product take turns in every round. Optimizers of 768 matrices are too large for that: each is made, timed and
freed before the next, so that one GPU of 80 GB is enough (six copies of the weights, 53 GB, and their workspaces).
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
    Made,
    distance,
    draw_stacks,
    give_gradients,
    interleaved,
    make_ours,
    milliseconds,
    random_matrix,
    stacked,
)
from moonlight.bench.report import BenchResult, time_ratio
from moonlight.optim import newton_schulz
from moonlight.optim.newton_schulz import COEFFICIENTS, orthogonalize

PRODUCT_SHAPE = (32, 1408, 2048)
PRODUCT_BAR = 480
"""TFLOP/s on the tiles that are computed."""
STEP_BARS = {"batched cuBLAS": 1.2, "torch.optim.Muon": 1.5, "muon-optimizer 0.1.0": 1.5}
GRAM_BAR = 0.9
TILINGS = ((128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 32, 4, 5), (128, 128, 8, 2), (64, 64, 4, 4))
"""Side, depth, warps and stages that are tried; the first is what the optimizer uses."""


def gpu_figures(rounds: int, exact: bool) -> tuple[list[BenchResult], list[str]]:
    """All figures and what is to be said of them. `exact`: whether accuracy has passed."""
    figures, notes = product_figures(rounds, "cuda", PRODUCT_SHAPE)
    if importlib.util.find_spec("gram_newton_schulz"):
        figures.append(_gram_newton_schulz(rounds, exact))
    else:
        notes.append("gram-newton-schulz is not installed and was left out")
    figures += step_figures(rounds, "cuda", exact, stacks=3, count=256, rows=2048, columns=1408)
    return figures, [*notes, "steps: one optimizer after the other, not in turns"]


def product_figures(rounds: int, device: str, shape: tuple[int, int, int]) -> tuple[list[BenchResult], list[str]]:
    """X X^T of X [count, n, k] in float16 beside torch.bmm, and the rates of all TILINGS."""
    from moonlight.kernels.symmetric import Tiling, symmetric_product

    count, n, k = shape
    x = torch.randn(shape, device=device).half()
    out, whole = x.new_empty(2, count, n, n)
    tilings = [Tiling(side, depth, num_warps=warps, num_stages=stages) for side, depth, warps, stages in TILINGS]
    cases: list[Callable[[], Any]] = [lambda: torch.bmm(x, x.mT, out=whole)]
    cases += [partial(symmetric_product, x, x.mT, out, tiling=tiling) for tiling in tilings]
    cublas, *ours = interleaved(rounds, device, cases)
    symmetric_product(x, x.mT, out)
    # Sums in another order: float32 rounding of k terms, and one of float16 on either side.
    right = torch.allclose(out.float(), whole.float(), rtol=2**-9, atol=2**-9 * k**0.5) and out.equal(out.mT)

    def rate(times: list[float], tiles: float) -> float:
        return 2 * count * tiles * k / (1e9 * statistics.median(times))

    rates = []
    for tiling, times in zip(tilings, ours, strict=True):
        rows = -(-n // tiling.side)
        rates.append(rate(times, rows * (rows + 1) / 2 * tiling.side**2))
    shown = f"symmetric product {count}x{n}x{k}, torch.bmm"
    figure = time_ratio(shown, ours[0], cublas, 1.0, right)
    figure = replace(figure, unit="TFLOP/s", ours=rates[0], peer=rate(cublas, n * n), bar=f">= {PRODUCT_BAR} TFLOP/s")
    figure = replace(figure, passed=right and rates[0] >= PRODUCT_BAR)
    notes = [
        f"symmetric product, tiles {t.side} x {t.depth}, {t.num_warps} warps, {t.num_stages} stages: {r:.0f} TFLOP/s"
        for t, r in zip(tilings, rates, strict=True)
    ]
    return [figure], notes


def _gram_newton_schulz(rounds: int, exact: bool) -> BenchResult:
    """Newton-Schulz of a batch beside the package of that name, as its README uses it."""
    from gram_newton_schulz import GramNewtonSchulz

    whole = torch.stack([random_matrix("gauss", *PRODUCT_SHAPE[1:], "cuda", seed) for seed in range(PRODUCT_SHAPE[0])])
    steps = [list(COEFFICIENTS["moonlight"][1])] * 5
    theirs = GramNewtonSchulz(ns_coefficients=steps, gram_newton_schulz_reset_iterations=[2])
    cases = [lambda: orthogonalize(whole, 5, "moonlight", torch.bfloat16), lambda: theirs(whole)]
    ours, peer = interleaved(rounds, "cuda", cases)
    return time_ratio("Newton-Schulz 32x1408x2048, gram-newton-schulz", ours, peer, GRAM_BAR, exact)


def step_figures(
    rounds: int, device: str, exact: bool, *, stacks: int, count: int, rows: int, columns: int
) -> list[BenchResult]:
    """Whole steps on `draw_stacks`, one optimizer after the other."""
    weights, gradients = draw_stacks(device, stacks, count, rows, columns)
    ours, own = _timed(rounds, device, make_ours, weights, gradients)
    moved = distance(weights, own)
    figures = []
    for name, make in {"batched cuBLAS": make_ours, **PEERS}.items():
        with _without_symmetry() if name == "batched cuBLAS" else contextlib.nullcontext():
            times, theirs = _timed(rounds, device, make, weights, gradients)
        apart = distance(own, theirs) / moved
        case = f"step {stacks * count}x{rows}x{columns}, {name}"
        figure = time_ratio(case, ours, times, STEP_BARS[name], exact and apart <= WEIGHT_TOLERANCE)
        figures.append(replace(figure, weights_apart=apart))
        del theirs
    return figures


@contextlib.contextmanager
def _without_symmetry() -> Iterator[None]:
    """Newton-Schulz as it is written, in batches by torch.bmm; the element-wise passes stay ours."""
    before = newton_schulz.GRAM_FROM_SIDE
    newton_schulz.GRAM_FROM_SIDE = sys.maxsize
    try:
        yield
    finally:
        newton_schulz.GRAM_FROM_SIDE = before


def _timed(
    rounds: int,
    device: str,
    make: Callable[[list[torch.Tensor]], Made],
    weights: list[torch.Tensor],
    gradients: list[torch.Tensor],
) -> tuple[list[float], list[torch.Tensor]]:
    """Milliseconds of every step but the first, and the weights afterwards, by stack; nothing else is kept."""
    optimizer, parameters = make(weights)
    times = []
    for _ in range(rounds + 1):
        give_gradients(parameters, gradients)
        times.append(milliseconds(optimizer.step, device))
    optimizer.zero_grad()
    optimizer.state.clear()
    after = stacked(parameters)
    if device == "cuda":
        torch.cuda.empty_cache()
    return times[1:], after
