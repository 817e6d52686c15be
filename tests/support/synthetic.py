"""Optimizer steps on synthetic gradients: the full gradient is the same in every layout."""

import hashlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from moonlight.config.run import RunConfig
from tests.support.layouts import Chunk, build, collect, flatten

Gradient = Callable[[str, tuple[int, ...], int], torch.Tensor]
"""(parameter key, full shape, step) -> the gradient of the full parameter summed over all ranks, float32."""


def normal_gradient(key: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    """Return normal numbers that depend only on the parameter's name and the step."""
    digest = hashlib.sha256(f"{key} {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(shape, generator=generator) * 0.01


def feed(optimizer: Any, gradient: Gradient, step: int) -> None:
    """Give every rank its term of the full gradients, and reduce the terms.

    Each term is the gradient divided by the number of ranks. That is 1, 2 or 4, so the sum is exact.
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
        for shard in local_shards(parameter.sharded_param):
            index = tuple(
                slice(start, start + size) for start, size in zip(shard.global_offset, shard.local_shape, strict=True)
            )
            full = to_hf_layout(gradient(parameter.key, to_hf_axes(shard.global_shape), step))
            rows = full[index].reshape(-1, parameter.columns)
            parameter.grad_2d[row : row + len(rows)] = rows / ranks
            row += len(rows)
    data_parallel.finish_grad_sync()


def state_after(config: RunConfig, steps: int) -> dict[str, Any]:
    """Return weights, masters, momenta and state bytes on this rank after steps at a small learning rate."""
    model_chunks, optimizer = build(config)
    for step in range(1, steps + 1):
        feed(optimizer, normal_gradient, step)
        norm = math.hypot(*optimizer.gradient_norms().values())
        optimizer.step(learning_rate=1e-3, weight_decay=0.1, step=step, gradient_norm=norm)
        optimizer.data_parallel.finish_param_sync()
    return {
        "weights": collect(model_chunks),
        "masters": flatten(optimizer.master_state_dict()),
        "momenta": flatten(optimizer.optimizer_state_dict()),
        "bytes": optimizer.state_bytes(),
    }


def weights_after(config: RunConfig, steps: int, gradient: Gradient = normal_gradient) -> dict[str, Any]:
    """Return the weights before and after every step, the gradient norms, and two counts of this rank.

    The counts are of matrices orthogonalized in the last step, and of owned shards that split a matrix.
    """
    from moonlight.optim import newton_schulz

    model_chunks, optimizer = build(config)
    history: list[list[Chunk]] = [collect(model_chunks)]
    norms: list[float] = []
    count = 0
    original = newton_schulz.orthogonalize

    def counting(matrices: torch.Tensor, *args: Any) -> torch.Tensor:
        nonlocal count
        count += matrices[..., 0, 0].numel()
        return original(matrices, *args)

    newton_schulz.orthogonalize = counting
    try:
        for step in range(1, steps + 1):
            count = 0
            feed(optimizer, gradient, step)
            norms.append(math.hypot(*optimizer.gradient_norms().values()))
            optimizer.step(learning_rate=1.0, weight_decay=0.1, step=step, gradient_norm=norms[-1])
            optimizer.data_parallel.finish_param_sync()
            history.append(collect(model_chunks))
    finally:
        newton_schulz.orthogonalize = original
    return {"history": history, "norms": norms, "matrices": count, "split": _count_split_shards(optimizer)}


def _count_split_shards(optimizer: Any) -> int:
    """Count the owned shards that hold only part of a matrix."""
    return sum(owned.shard.is_split for owned in optimizer.owned)


def updates(weights: list[dict[str, np.ndarray]], weight_decay: float = 0.1) -> list[dict[str, np.ndarray]]:
    """Return what each step subtracted at learning rate 1, without the weight decay, float64."""
    return [
        {key: (1 - weight_decay) * old[key].astype(np.float64) - new[key] for key in old if not key.endswith("bias")}
        for old, new in itertools.pairwise(weights)
    ]


def zero_experts(key: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    """Return the gradients of a batch that was routed to no expert."""
    return torch.zeros(shape) if ".experts." in key else normal_gradient(key, shape, step)
