"""Optimizers that the benchmarks compare, their input matrices, and the timer."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moonlight.optim.muon import Muon

WEIGHT_TOLERANCE = 0.05
"""Maximum distance of a peer's weights from ours, relative to our weights' movement; rounding gives 0.01 to 0.03."""
LEARNING_RATE, DECAY = 1e-3, 0.1

Parameters = list[torch.nn.Parameter]
OptimizerAndParams = tuple[torch.optim.Optimizer, list[Parameters]]
"""An optimizer and its parameters by stack of matrices."""


def random_matrix(spectrum: str, rows: int, columns: int, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """Return a float32 matrix [rows, columns] with a spectrum "gauss", "power law" or another name.

    "gauss" is a Gaussian matrix. The others have random bases: singular values are 1/i for "power law", otherwise
    10^(-4 u) with uniform u.
    """
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


def random_stacks(
    device: str, stacks: int, count: int, rows: int, columns: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return float32 weights and gradients of `stacks` stacks of `count` expert matrices.

    Two of three stacks have matrices [rows, columns], the third [columns, rows].
    """
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(rows, columns) if index % 3 < 2 else (columns, rows) for index in range(stacks)]
    weights = [0.02 * torch.randn(count, *shape, generator=generator, device=device) for shape in shapes]
    return weights, [torch.randn(count, *shape, generator=generator, device=device) for shape in shapes]


def build_ours(weights: list[torch.Tensor]) -> OptimizerAndParams:
    """Return our optimizer on copies of the stacks, one parameter per stack."""
    parameters = [[torch.nn.Parameter(weight.clone())] for weight in weights]
    return Muon([stack[0] for stack in parameters], lr=LEARNING_RATE, weight_decay=DECAY), parameters


def _build_torch(weights: list[torch.Tensor]) -> OptimizerAndParams:
    parameters = _split(weights)
    flat = [parameter for stack in parameters for parameter in stack]
    return torch.optim.Muon(flat, lr=LEARNING_RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"), parameters


def _build_keller(weights: list[torch.Tensor]) -> OptimizerAndParams:
    from muon import SingleDeviceMuon

    parameters = _split(weights)
    groups: list[dict[str, Any]] = []
    for stack in parameters:
        # SingleDeviceMuon multiplies by sqrt(max(1, rows / columns)) instead of 0.2 sqrt(max(rows, columns)).
        rows, columns = stack[0].shape
        factor = 0.2 * max(rows, columns) ** 0.5 / max(1, rows / columns) ** 0.5
        groups.append({"params": stack, "lr": LEARNING_RATE * factor, "weight_decay": DECAY / factor})
    return SingleDeviceMuon(groups), parameters


PEERS = {"torch.optim.Muon": _build_torch, "muon-optimizer 0.1.0": _build_keller}
"""Optimizers with one parameter per matrix of the stacks, configured to make the same update as ours."""


def _split(weights: list[torch.Tensor]) -> list[Parameters]:
    return [[torch.nn.Parameter(matrix.clone()) for matrix in weight] for weight in weights]


def set_gradients(parameters: list[Parameters], gradients: list[torch.Tensor]) -> None:
    """Set gradients to copies, because the published Muon overwrites its gradients."""
    for stack, gradient in zip(parameters, gradients, strict=True):
        for parameter, value in zip(stack, gradient.reshape(len(stack), *stack[0].shape), strict=True):
            parameter.grad = value.clone()


def stack_weights(parameters: list[Parameters]) -> list[torch.Tensor]:
    """Return copies of the weights by stack, [count, rows, columns]. Empties `parameters`, to free memory."""
    weights = []
    while parameters:
        stack = parameters.pop(0)
        weights.append(torch.cat([parameter.detach().reshape(-1, *stack[0].shape[-2:]) for parameter in stack]))
    return weights


@torch.no_grad()
def distance(updates: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """Return the Euclidean distance of two lists of tensors, each as one vector."""
    return sum((one - other).norm().item() ** 2 for one, other in zip(updates, reference, strict=True)) ** 0.5


def interleaved(
    rounds: int, device: str, cases: list[Callable[[], Any]], before: Callable[[], None] | None = None
) -> list[list[float]]:
    """Return the milliseconds of each case in every round, after one warm-up round. `before` runs before each round."""
    times: list[list[float]] = [[] for _ in cases]
    for round_index in range(rounds + 1):
        if before:
            before()
        for case, case_times in zip(cases, times, strict=True):
            elapsed = milliseconds(case, device)
            if round_index:
                case_times.append(elapsed)
    return times


def milliseconds(case: Callable[[], Any], device: str) -> float:
    """Return the milliseconds of one call: CPU time of this thread on a CPU, time between events on a GPU."""
    if device == "cpu":
        start = time.thread_time()
        case()
        return 1e3 * (time.thread_time() - start)
    start_event, stop_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start_event.record()
    case()
    stop_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(stop_event)
