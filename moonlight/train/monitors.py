"""Monitored values, reduced over all ranks: norms by group, attention logits and expert load by layer, memory."""

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
    """Values that are only collected in steps of `monitor.every_steps`."""

    loads: tuple[tuple[float, ...], ...]
    """Load of each expert of each layer with experts, relative to an even load (1.0)."""
    weight_rms: dict[str, float]
    """RMS of the weights after the update, by group."""
    peak_memory_bytes: int
    """Peak memory of the rank that used most."""
    svd_entropies: dict[str, float] = field(default_factory=dict)
    """SVD entropy by group of matrices, only in steps of `monitor.svd_entropy_every_steps`."""


def is_due(step: int, every_steps: int) -> bool:
    """Return True in step 1 and in multiples of `every_steps`; always False if that is 0."""
    return every_steps > 0 and (step == 1 or step % every_steps == 0)


def root_mean_squares(sums: torch.Tensor) -> dict[str, float]:
    """Return the root mean square of each monitor group that has elements. Collective over all ranks.

    Args:
        sums: this rank's sum of squares and count of each group, [groups, 2]; overwritten with the sums of all ranks.
    """
    dist.all_reduce(sums)
    return {
        name: math.sqrt(square / count)
        for name, (square, count) in zip(MONITOR_GROUPS, sums.tolist(), strict=True)
        if count
    }


def logits_by_layer(
    maxima: torch.Tensor, attentions: Sequence[CausalAttention], model_config: ModelConfig, group: dist.ProcessGroup
) -> tuple[float, ...]:
    """Return the largest attention logit of every layer of the model. Collective over `group`.

    Args:
        maxima: largest logits of this rank's `attentions`, float32 [layers, heads].
        group: ranks that together hold every layer and head (tensor- and pipeline-parallel).
    """
    largest = torch.full((model_config.num_hidden_layers,), -math.inf, device=maxima.device)
    if attentions:  # otherwise the stage has no layer
        largest[[attention.layer_number - 1 for attention in attentions]] = maxima.amax(-1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return tuple(largest.tolist())


def loads_by_layer(
    counts: torch.Tensor, routers: Sequence[Router], model_config: ModelConfig, group: dist.ProcessGroup
) -> tuple[tuple[float, ...], ...]:
    """Return the load of every expert of every layer with experts, relative to an even load. Collective over `group`.

    Args:
        counts: tokens sent to each expert of this rank's `routers`, over all data, float32 [layers, experts].
        group: ranks that together hold every layer (pipeline-parallel).
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
    """Collect the values of a monitored step; `routers` and `counts` as in `loads_by_layer`. Collective."""
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
    """Return the largest peak memory of any rank in bytes: GPU memory, or host memory without CUDA. Collective."""
    if torch.cuda.is_available():
        local_peak = torch.cuda.max_memory_allocated()
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        local_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peak = torch.tensor(local_peak, dtype=torch.int64, device=torch.cuda.current_device())
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return int(peak.item())
