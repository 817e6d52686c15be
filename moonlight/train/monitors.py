"""What is watched beside the loss, brought together from all ranks: norms by group, logits and expert load by layer."""

import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import torch
import torch.distributed as dist

from moonlight.config.model import ModelConfig
from moonlight.config.run import RunConfig
from moonlight.model.attention import CausalAttention
from moonlight.model.router import Router
from moonlight.optim.distributed_muon import DistributedMuon
from moonlight.optim.svd_entropy import mean_svd_entropies
from moonlight.placement.param_groups import MONITOR_GROUPS


@dataclass(frozen=True)
class MonitorValues:
    """What only steps of `monitor.every_steps` look at."""

    loads: tuple[tuple[float, ...], ...]
    """Of each expert of each layer with experts, in units of the even share."""
    weight_rms: dict[str, float]
    """By group, after the update."""
    peak_memory_bytes: int
    """The largest of all ranks."""
    svd_entropies: dict[str, float] = field(default_factory=dict)
    """By group of matrices, in steps of `monitor.svd_entropy_every_steps`."""


def is_due(step: int, every_steps: int) -> bool:
    """Whether something watched every so many steps is watched in this one; the first step always is. 0: never."""
    return every_steps > 0 and (step == 1 or step % every_steps == 0)


def root_mean_squares(sums: torch.Tensor) -> dict[str, float]:
    """By group, of `sums` [groups, 2]: this rank's sum of squares and count. Every rank of the world calls it."""
    dist.all_reduce(sums)
    return {
        name: math.sqrt(square / count)
        for name, (square, count) in zip(MONITOR_GROUPS, sums.tolist(), strict=True)
        if count
    }


def logits_by_layer(
    maxima: torch.Tensor, attentions: Sequence[CausalAttention], model_config: ModelConfig, group: dist.ProcessGroup
) -> tuple[float, ...]:
    """Largest attention logit of every layer of the model.

    Args:
        maxima: of this rank's `attentions`, float32 [layers, heads].
        group: joins the ranks that together have every layer and head (tensor- and pipeline-parallel).
    """
    largest = torch.full((model_config.num_hidden_layers,), -math.inf, device=maxima.device)
    if attentions:  # else the stage has no layer
        largest[[attention.layer_number - 1 for attention in attentions]] = maxima.amax(-1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return tuple(largest.tolist())


def loads_by_layer(
    counts: torch.Tensor, routers: Sequence[Router], model_config: ModelConfig, group: dist.ProcessGroup
) -> tuple[tuple[float, ...], ...]:
    """Load of every expert of every layer that has some, in units of the even share.

    Args:
        counts: tokens sent to each expert of this rank's `routers`, over all data, float32 [layers, experts].
        group: joins the ranks that together have every layer (pipeline-parallel).
    """
    first = model_config.first_k_dense_replace
    loads = torch.zeros(
        model_config.num_hidden_layers - first, model_config.num_experts, device=torch.cuda.current_device()
    )
    if routers:
        loads[[router.layer_number - 1 - first for router in routers]] = counts / counts.mean(-1, keepdim=True)
    dist.all_reduce(loads, group=group)
    return tuple(map(tuple, loads.tolist()))


def collect_monitors(
    optimizer: DistributedMuon,
    config: RunConfig,
    step: int,
    routers: Sequence[Router],
    counts: torch.Tensor,
    pipeline_group: dist.ProcessGroup,
) -> MonitorValues:
    """What a watched step looks at; `routers` and `counts` as in `loads_by_layer`. Every rank calls it."""
    entropies = {}
    if is_due(step, config.monitor.svd_entropy_every_steps):
        optimizer.data_parallel.finish_param_sync()
        entropies = mean_svd_entropies(optimizer.data_parallel.parameters, config.model.num_experts)
    return MonitorValues(
        loads=loads_by_layer(counts, routers, config.model, pipeline_group),
        weight_rms=root_mean_squares(optimizer.weight_sums()),
        peak_memory_bytes=peak_memory_bytes(),
        svd_entropies=entropies,
    )


def peak_memory_bytes() -> int:
    """The most that any rank has used so far: of its GPU, or without one of the machine's memory."""
    if torch.cuda.is_available():
        here = torch.cuda.max_memory_allocated()
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    most = torch.tensor(here, dtype=torch.int64, device=torch.cuda.current_device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most.item())
