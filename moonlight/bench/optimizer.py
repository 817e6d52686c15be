"""`moonlight bench optimizer`: is Muon's arithmetic as exact as the plain loop, and how much faster is it?

Accuracy comes first: a figure of speed counts only if its gate has passed. Cases of one figure take turns in every
round. On a CPU the time is that of the one computing thread, so neighbours on the machine matter little.
"""

import importlib.metadata
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moonlight.bench.report import Figure, hardware, report, speed
from moonlight.errors import UserError
from moonlight.optim.muon import Muon
from moonlight.optim.newton_schulz import COEFFICIENTS, orthogonalize

PEER = "muon-optimizer==0.1.0"
SPECTRA = ("gauss", "power law", "four decades")
SPEED_SHAPES = ((1408, 2048), (11264, 2048))
ACCURACY_SHAPES = ((64, 44), (704, 1024), (2816, 512), *SPEED_SHAPES)
NEWTON_SCHULZ_BAR = 1.2
STEP_BAR = 10.0
ACCURACY_BAR = 0.98
"""Least error of the plain loop over ours: 2% for chance, since batched products may sum in another order."""
WEIGHT_TOLERANCE = 0.05
"""Largest distance of a peer's weights from ours, over the distance gone; their rounding gives 0.01 to 0.03."""
LEARNING_RATE, DECAY = 1e-3, 0.1

Parameters = list[torch.nn.Parameter]
Made = tuple[torch.optim.Optimizer, list[Parameters]]
"""An optimizer and its parameters, by stack of matrices."""


def random_matrix(spectrum: str, rows: int, columns: int, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """A float32 matrix [rows, columns]: Gaussian, or with random bases and singular values 1/i or 10^(-4 u)."""
    generator = torch.Generator().manual_seed(seed)
    if spectrum == "gauss":
        return torch.randn(rows, columns, generator=generator).to(device)
    count = min(rows, columns)
    left, _ = torch.linalg.qr(torch.randn(rows, count, generator=generator).to(device))
    right, _ = torch.linalg.qr(torch.randn(columns, count, generator=generator).to(device))
    values = (
        1 / torch.arange(1, count + 1)
        if spectrum == "power law"
        else 10 ** (-4 * torch.rand(count, generator=generator))
    )
    return (left * values.to(device)) @ right.mT


def plain_loop(whole: torch.Tensor, dtype: torch.dtype, num_steps: int = 5, name: str = "moonlight") -> torch.Tensor:
    """The iteration on one matrix as the other optimizers write it, its sums rounded once like torch.optim.Muon's."""
    first, then = COEFFICIENTS[name]
    x = whole.mT if whole.shape[0] > whole.shape[1] else whole
    x = (x / (x.norm() + 1e-7)).to(dtype)
    for step in range(num_steps):
        a, b, c = first[step] if step < len(first) else then
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if whole.shape[0] > whole.shape[1] else x


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
            from moonlight.bench.optimizer_gpu import gpu_figures

            measured, notes = gpu_figures(rounds, exact)
            figures += measured
    finally:
        torch.set_num_threads(threads)
    notes += [
        f"{figure.case}: weights differ by {figure.weights_apart:.4f} of the way gone (at most {WEIGHT_TOLERANCE})"
        for figure in figures
        if figure.weights_apart is not None
    ]
    return report("Muon: accuracy, then speed", figures, machine, notes, json_path)


def _accuracy(rows: int, columns: int, spectrum: str, device: str) -> Figure:
    """Relative error of ours and of the plain bfloat16 loop to the same iteration in float32."""
    whole = random_matrix(spectrum, rows, columns, device)
    exact = plain_loop(whole, torch.float32)
    errors = []
    for result in (orthogonalize(whole, 5, "moonlight", torch.bfloat16), plain_loop(whole, torch.bfloat16)):
        errors.append(((result.float() - exact).norm() / exact.norm()).item())
    ours, peer = errors
    return Figure(
        f"error {rows}x{columns}, {spectrum}",
        "",
        ours,
        peer,
        peer / ours,
        "",
        f">= {ACCURACY_BAR}",
        peer >= ACCURACY_BAR * ours,
    )


def _newton_schulz(rounds: int, rows: int, columns: int, device: str, exact: bool) -> Figure:
    whole = random_matrix("gauss", rows, columns, device)
    ours, peer = interleaved(
        rounds,
        device,
        [
            lambda: orthogonalize(whole, 5, "moonlight", torch.bfloat16),
            lambda: plain_loop(whole, torch.bfloat16),
        ],
    )
    return speed(f"Newton-Schulz {rows}x{columns}, plain loop", ours, peer, NEWTON_SCHULZ_BAR, exact)


def _steps(rounds: int, device: str, exact: bool, *, stacks: int, count: int, rows: int, columns: int) -> list[Figure]:
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
        figure = speed(case, times[0], peer, STEP_BAR, exact and apart <= WEIGHT_TOLERANCE)
        figures.append(replace(figure, weights_apart=apart))
    return figures


def draw_stacks(
    device: str, stacks: int, count: int, rows: int, columns: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights and gradients of stacks of expert matrices, two of [rows, columns] to one of its transpose."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(rows, columns) if index % 3 < 2 else (columns, rows) for index in range(stacks)]
    weights = [0.02 * torch.randn(count, *shape, generator=generator, device=device) for shape in shapes]
    return weights, [torch.randn(count, *shape, generator=generator, device=device) for shape in shapes]


def make_ours(weights: list[torch.Tensor]) -> Made:
    """Our optimizer on copies of the stacks."""
    parameters = [[torch.nn.Parameter(weight.clone())] for weight in weights]
    return Muon([own[0] for own in parameters], lr=LEARNING_RATE, weight_decay=DECAY), parameters


def _make_torch(weights: list[torch.Tensor]) -> Made:
    parameters = _split(weights)
    flat = [parameter for own in parameters for parameter in own]
    return torch.optim.Muon(flat, lr=LEARNING_RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"), parameters


def _make_keller(weights: list[torch.Tensor]) -> Made:
    from muon import SingleDeviceMuon

    parameters = _split(weights)
    groups: list[dict[str, Any]] = []
    for own in parameters:
        # It multiplies by sqrt(max(1, rows / columns)) instead of 0.2 sqrt(max(rows, columns)).
        height, width = own[0].shape
        factor = 0.2 * max(height, width) ** 0.5 / max(1, height / width) ** 0.5
        groups.append({"params": own, "lr": LEARNING_RATE * factor, "weight_decay": DECAY / factor})
    return SingleDeviceMuon(groups), parameters


PEERS = {"torch.optim.Muon": _make_torch, "muon-optimizer 0.1.0": _make_keller}
"""Optimizers that move a parameter for every matrix of the stacks as ours does."""


def _split(weights: list[torch.Tensor]) -> list[Parameters]:
    return [[torch.nn.Parameter(part.clone()) for part in weight] for weight in weights]


def give_gradients(parameters: list[Parameters], gradients: list[torch.Tensor]) -> None:
    """Copies, because the published Muon overwrites its gradients."""
    for own, gradient in zip(parameters, gradients, strict=True):
        for parameter, value in zip(own, gradient.reshape(len(own), *own[0].shape), strict=True):
            parameter.grad = value.clone()


def stacked(parameters: list[Parameters]) -> list[torch.Tensor]:
    """Copies of the weights by stack, [count, rows, columns]; `parameters` is emptied on the way, to free memory."""
    after = []
    while parameters:
        own = parameters.pop(0)
        after.append(torch.cat([parameter.detach().reshape(-1, *own[0].shape[-2:]) for parameter in own]))
    return after


@torch.no_grad()
def distance(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """Between two lists of tensors, as one vector each."""
    return sum((one - other).norm().item() ** 2 for one, other in zip(some, others, strict=True)) ** 0.5


def interleaved(
    rounds: int, device: str, cases: list[Callable[[], Any]], before: Callable[[], None] | None = None
) -> list[list[float]]:
    """Milliseconds of each case in every round, after one round that does not count."""
    times: list[list[float]] = [[] for _ in cases]
    for count in range(rounds + 1):
        if before:
            before()
        for case, measured in zip(cases, times, strict=True):
            elapsed = milliseconds(case, device)
            if count:
                measured.append(elapsed)
    return times


def milliseconds(case: Callable[[], Any], device: str) -> float:
    """Of the computing thread on a CPU, between events on a GPU."""
    if device == "cpu":
        start = time.thread_time()
        case()
        return 1e3 * (time.thread_time() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    case()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)
