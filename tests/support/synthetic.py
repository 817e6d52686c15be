"""Optimizer steps on gradients that are given, not computed: the same whole gradient whatever the layout."""

import hashlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.support.layouts import Piece, Recipe, build, collect, flatten

Gradient = Callable[[str, tuple[int, ...], int], torch.Tensor]
"""(parameter, whole shape, step) -> the world's gradient of the whole parameter, float32."""


def normal_gradient(key: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    """Normal numbers that depend on the parameter's name and the step alone."""
    digest = hashlib.sha256(f"{key} {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(shape, generator=generator) * 0.01


def feed(optimizer: Any, gradient: Gradient, step: int) -> None:
    """Give every rank its share of the whole gradients, so that the shares add up to them, and exchange them.

    Shares are a power of two each, in worlds of 1, 2 and 4: their sum is exact.
    """
    from moonlight.model.shards import local_shards, to_hf_axes, to_hf_layout
    from moonlight.optim.parameters import data_parallel_group, tensor_parallel_group

    data_parallel = optimizer.data_parallel
    data_parallel.zero_grad_buffer()
    for parameter in data_parallel.parameters:
        ranks = data_parallel_group(parameter.is_expert).size()
        if parameter.tp_mode == "replicated":
            ranks *= tensor_parallel_group(parameter.is_expert).size()
        row = 0
        for piece in local_shards(parameter.sharded_param):
            where = tuple(
                slice(start, start + size) for start, size in zip(piece.global_offset, piece.local_shape, strict=True)
            )
            whole = to_hf_layout(gradient(parameter.key, to_hf_axes(piece.global_shape), step))
            part = whole[where].reshape(-1, parameter.columns)
            parameter.grad_2d[row : row + len(part)] = part / ranks
            row += len(part)
    data_parallel.finish_grad_sync()


def state_after(run: Recipe, steps: int) -> dict[str, Any]:
    """Weights, masters, momenta and their bytes on this rank after steps at a small learning rate."""
    models, optimizer = build(run)
    for number in range(1, steps + 1):
        feed(optimizer, normal_gradient, number)
        norm = math.hypot(*optimizer.gradient_norms().values())
        optimizer.step(learning_rate=1e-3, weight_decay=0.1, step=number, gradient_norm=norm)
        optimizer.data_parallel.finish_param_sync()
    return {
        "weights": collect(models),
        "masters": flatten(optimizer.master_state_dict()),
        "momenta": flatten(optimizer.optimizer_state_dict()),
        "bytes": optimizer.state_bytes(),
    }


def weights_after(run: Recipe, steps: int, gradient: Gradient = normal_gradient) -> dict[str, Any]:
    """Weights before and after every step, the norms, and how many matrices this rank orthogonalised in the last."""
    from moonlight.optim import newton_schulz

    models, optimizer = build(run)
    history: list[list[Piece]] = [collect(models)]
    norms: list[float] = []
    count = 0
    real = newton_schulz.orthogonalize

    def counting(matrices: torch.Tensor, *args: Any) -> torch.Tensor:
        nonlocal count
        count += matrices[..., 0, 0].numel()
        return real(matrices, *args)

    newton_schulz.orthogonalize = counting
    try:
        for number in range(1, steps + 1):
            count = 0
            feed(optimizer, gradient, number)
            norms.append(math.hypot(*optimizer.gradient_norms().values()))
            optimizer.step(learning_rate=1.0, weight_decay=0.1, step=number, gradient_norm=norms[-1])
            optimizer.data_parallel.finish_param_sync()
            history.append(collect(models))
    finally:
        newton_schulz.orthogonalize = real
    return {"history": history, "norms": norms, "matrices": count, "cut": _number_cut(optimizer)}


def _number_cut(optimizer: Any) -> int:
    """Owned rows that are a part of a matrix only."""
    return sum(owned.shard.is_split for owned in optimizer.owned)


def updates(weights: list[dict[str, np.ndarray]], weight_decay: float = 0.1) -> list[dict[str, np.ndarray]]:
    """What each step subtracted at learning rate 1, decay apart, float64."""
    return [
        {key: (1 - weight_decay) * old[key].astype(np.float64) - new[key] for key in old if not key.endswith("bias")}
        for old, new in itertools.pairwise(weights)
    ]


def zero_experts(key: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    """Gradients of a batch that no routed expert saw."""
    return torch.zeros(shape) if ".experts." in key else normal_gradient(key, shape, step)
