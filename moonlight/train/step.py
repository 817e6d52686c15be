"""One optimizer step: gradients, update, statistics.

A step is skipped on all ranks if the loss or a gradient is not finite on any rank, or if the loss is a spike and the
run has a policy for spikes. A skipped step changes nothing: not the weights, the momenta or the router biases.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from moonlight.config.run import RunConfig
from moonlight.config.timeline import StepSchedule
from moonlight.model.attention import CausalAttention
from moonlight.model.router import update_expert_bias
from moonlight.optim.distributed_muon import DistributedMuon
from moonlight.optim.parameters import data_parallel_group
from moonlight.optim.qk_clip import collect_max_logits, logit_factors, row_factors
from moonlight.train.forward_backward import MicroBatch, find_attentions, find_routers, forward_backward
from moonlight.train.monitors import MonitorValues, collect_monitors, is_due, logits_by_layer, root_mean_squares


@dataclass(frozen=True)
class StepResult:
    """Outcome of one training step. Equal on every rank."""

    loss: float
    aux_loss: float
    """Mean over sequences of the auxiliary loss, summed over layers, without its coefficient."""
    gradient_norm: float
    skipped: bool
    """True if the step changed nothing: loss or gradient was not finite, or the loss was a spike to skip."""
    is_spike: bool
    """True if the loss was finite and above the spike limit."""
    gradient_norms: dict[str, float]
    """By parameter group."""
    update_rms: dict[str, float]
    """RMS of the update before the learning rate, by parameter group; empty if skipped."""
    max_load: float
    """Largest load of an expert, over all layers, relative to an even load."""
    dead_experts: int
    """Experts, over all layers, that got no token."""
    clipped_heads: int
    """Heads, over all layers, whose query and key weights `qk_clip` scaled down."""
    max_logits: tuple[float, ...]
    """Largest attention logit of each layer; infinite if one was not a number. With `qk_clip` over the whole batch.
    Otherwise over the first micro-batch of every data-parallel rank in monitored steps, and empty in others."""
    monitors: MonitorValues | None = None
    """In monitored steps only."""

    @property
    def max_logit(self) -> float:
        """Largest attention logit over all layers."""
        return max(self.max_logits, default=-math.inf)


@dataclass(frozen=True)
class _Gradients:
    """Loss and gradient norms of a step, and the decisions that follow from them. Equal on every rank."""

    loss: float
    norm: float
    norms: dict[str, float]
    skip: bool
    is_spike: bool


@dataclass(frozen=True)
class _Logits:
    """Attention logits that this rank recorded in a step."""

    attentions: Sequence[CausalAttention]
    maxima: torch.Tensor
    """float32 [layers, heads] of this rank."""
    max_logits: tuple[float, ...]
    """Of each layer of the model."""


def train_step(
    model_chunks: Sequence[GPTModel],
    optimizer: DistributedMuon,
    config: RunConfig,
    batches: Sequence[MicroBatch],
    schedule: StepSchedule,
    spike_limit: float = math.inf,
    before_update: Callable[[], None] = lambda: None,
) -> StepResult:
    """Train one step: gradients, clipping, update, query-key clip, router biases. Collective.

    Args:
        batches: this data-parallel rank's micro-batches.
        spike_limit: a loss above it is a spike.
        before_update: called before any state changes.
    """
    is_monitored = is_due(schedule.step, config.monitor.every_steps)
    gradients = _compute_gradients(model_chunks, optimizer, config, batches, spike_limit, is_monitored)
    before_update()
    logits = _collect_logits(model_chunks, config, is_monitored)
    update_rms: dict[str, float] = {}
    clipped_heads = torch.zeros((), dtype=torch.int64, device=torch.cuda.current_device())
    if not gradients.skip:
        update_rms, clipped_heads = _update(optimizer, config, schedule, gradients.norm, logits)
    if config.optimizer.qk_clip > 0:
        dist.all_reduce(clipped_heads, group=_head_group())
    bias_update_rate = 0.0 if gradients.skip else schedule.router_bias_update_rate
    max_load, aux_loss, dead_experts, monitors = _update_routers(
        model_chunks, optimizer, config, schedule, bias_update_rate, is_monitored
    )
    return StepResult(
        loss=gradients.loss,
        aux_loss=aux_loss,
        gradient_norm=gradients.norm,
        skipped=gradients.skip,
        is_spike=gradients.is_spike,
        gradient_norms=gradients.norms,
        update_rms=update_rms,
        max_load=max_load,
        dead_experts=dead_experts,
        clipped_heads=int(clipped_heads.item()),
        max_logits=logits.max_logits if logits else (),
        monitors=monitors,
    )


def _compute_gradients(
    model_chunks: Sequence[GPTModel],
    optimizer: DistributedMuon,
    config: RunConfig,
    batches: Sequence[MicroBatch],
    spike_limit: float,
    is_monitored: bool,
) -> _Gradients:
    """Run the batch forward and backward, and decide with all ranks whether the step is skipped."""
    recorded_batches = len(batches) if config.optimizer.qk_clip > 0 else int(is_monitored)
    optimizer.data_parallel.zero_grad_buffer()
    loss_tensor, _ = forward_backward(model_chunks, config, batches, recorded_batches=recorded_batches)
    norms = optimizer.gradient_norms()
    norm, loss = math.hypot(*norms.values()), loss_tensor.item()
    is_finite = math.isfinite(norm) and math.isfinite(loss)
    not_finite, is_above = _any_rank(not is_finite, loss > spike_limit)
    is_spike = is_above and not not_finite
    skip = not_finite or (is_spike and config.train.spike_policy != "none")
    return _Gradients(loss=loss, norm=norm, norms=norms, skip=skip, is_spike=is_spike)


def _any_rank(*flags: bool) -> tuple[bool, ...]:
    """Return whether each flag is set on any rank. Ranks that decided differently would wait for each other forever."""
    tensor = torch.tensor(flags, dtype=torch.int32, device=torch.cuda.current_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tuple(bool(flag) for flag in tensor.tolist())


def _collect_logits(model_chunks: Sequence[GPTModel], config: RunConfig, is_monitored: bool) -> _Logits | None:
    """Reduce the recorded attention logits over all ranks; None if the step records none."""
    if not (config.optimizer.qk_clip > 0 or is_monitored):
        return None
    attentions = find_attentions(model_chunks)
    maxima = collect_max_logits(attentions, data_parallel_group(expert=False))
    max_logits = logits_by_layer(maxima, attentions, config.model, _head_group())
    return _Logits(attentions, maxima, max_logits)


def _head_group() -> dist.ProcessGroup:
    """Return the tensor- and pipeline-parallel ranks, which together have every head once."""
    return parallel_state.get_model_parallel_group()


def _update(
    optimizer: DistributedMuon, config: RunConfig, schedule: StepSchedule, gradient_norm: float, logits: _Logits | None
) -> tuple[dict[str, float], torch.Tensor]:
    """Update the weights.

    Returns:
        RMS of the update by parameter group, and the number of this rank's heads that `qk_clip` scaled down: int64 [].
    """
    clipped_heads, factors = torch.zeros((), dtype=torch.int64, device=torch.cuda.current_device()), None
    if config.optimizer.qk_clip > 0:
        assert logits is not None
        gammas = logit_factors(logits.maxima, config.optimizer.qk_clip)
        clipped_heads = (gammas < 1).sum()
        factors = row_factors(logits.attentions, gammas, config.model)
    update_sums = optimizer.step(
        learning_rate=schedule.learning_rate,
        weight_decay=config.optimizer.weight_decay,
        step=schedule.step,
        gradient_norm=gradient_norm,
        row_factors=factors,
    )
    return root_mean_squares(update_sums), clipped_heads


def _update_routers(
    model_chunks: Sequence[GPTModel],
    optimizer: DistributedMuon,
    config: RunConfig,
    schedule: StepSchedule,
    bias_update_rate: float,
    is_monitored: bool,
) -> tuple[float, float, int, MonitorValues | None]:
    """Move the router biases by the step's expert loads, and reduce the routers' statistics over all ranks.

    Returns:
        Largest expert load, auxiliary loss, number of dead experts, and the monitors of a monitored step.
    """
    device = torch.cuda.current_device()
    model_group = parallel_state.get_tensor_and_data_parallel_group()
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    max_load, aux_loss, dead_experts, counts = torch.zeros(4, device=device).unbind()
    if routers := find_routers(model_chunks):
        counts = update_expert_bias(routers, bias_update_rate, model_group)
        max_load = (counts.max(-1).values / counts.mean(-1)).max()
        dead_experts = (counts == 0).sum().float()
        aux_loss = torch.stack([router.aux_loss for router in routers]).sum() / schedule.global_batch_size
        dist.all_reduce(aux_loss, group=model_group)
    over_layers = torch.stack([aux_loss, dead_experts])
    dist.all_reduce(over_layers, group=pipeline_group)
    dist.all_reduce(max_load, op=dist.ReduceOp.MAX, group=pipeline_group)
    monitors = None
    if is_monitored:
        monitors = collect_monitors(optimizer, config, schedule.step, routers, counts, pipeline_group)
    return max_load.item(), over_layers[0].item(), int(over_layers[1].item()), monitors
