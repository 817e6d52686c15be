"""Optimizers that the benchmarks compare, the matrices they are run on, and how they are timed."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moonlight.optim.muon import Muon

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
def distance(updates: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """Between two lists of tensors, as one vector each."""
    return sum((one - other).norm().item() ** 2 for one, other in zip(updates, reference, strict=True)) ** 0.5


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
