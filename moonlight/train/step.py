"""One forward and backward pass over a global batch, with a loss that does not depend on the layout.

The objective is: sum of the counted tokens' losses / counted tokens of the global batch, plus aux_loss_alpha x the
mean over the global batch's sequences of the auxiliary loss, summed over layers. Every rank and micro-batch adds its
share, already divided by the global count, so gradients are only ever summed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_layer import MoELayer

from moonlight.config.run import RunConfig
from moonlight.config.timeline import StepSchedule
from moonlight.data.loader import PackedSample, Sample, collate
from moonlight.model.attention import CausalAttention
from moonlight.model.router import Router, update_expert_bias
from moonlight.optim.distributed_muon import DistributedMuon
from moonlight.optim.parameters import data_parallel_group
from moonlight.optim.qk_clip import collect_max_logits, logit_factors, row_factors
from moonlight.train.monitors import MonitorValues, collect_monitors, is_due, logits_by_layer, root_mean_squares


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of this data-parallel rank. All [micro_batch_size, sequence_length]."""

    tokens: torch.Tensor
    """int64 ids."""
    labels: torch.Tensor
    """int64 ids: the next token of each."""
    loss_mask: torch.Tensor
    """float32: 1 where the label counts, 0 where not."""
    documents: torch.Tensor | None = None
    """int32: number of each token's document within the sequence; None takes the sequence for one."""


def local_samples(numbers: Sequence[int]) -> Sequence[int]:
    """This data-parallel rank's run of the samples of a global batch."""
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    each = len(numbers) // size
    return numbers[rank * each : (rank + 1) * each]


def make_micro_batches(samples: Sequence[Sample], config: RunConfig, eos_id: int) -> list[MicroBatch]:
    """Cut samples into micro-batches on this rank's device. Documents of text end with `eos_id`."""
    device, size = torch.cuda.current_device(), config.train.micro_batch_size
    apart = config.data.mask_documents or config.data.reset_positions
    batches = []
    for start in range(0, len(samples), size):
        some = samples[start : start + size]
        tokens, labels, loss_mask = (tensor.to(device) for tensor in collate(some))
        documents = None
        if known := [sample.documents for sample in some if isinstance(sample, PackedSample)]:
            documents = torch.from_numpy(np.stack(known)).to(device)
        elif apart:
            documents = compute_document_ids(tokens, eos_id)
        batches.append(MicroBatch(tokens, labels, loss_mask, documents))
    return batches


def compute_document_ids(tokens: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Number of each token's document within its sequence, from 0: a token after `eos_id` begins one. int32."""
    ends = (tokens == eos_id).to(torch.int32)
    return ends.cumsum(1, dtype=torch.int32) - ends


def routers(model_chunks: Sequence[Any]) -> list[Router]:
    """The routers of this rank, in the order of their layers."""
    found = [module for model in model_chunks for module in model.modules() if isinstance(module, Router)]
    return sorted(found, key=lambda router: router.layer_number)


def attentions(model_chunks: Sequence[Any]) -> list[CausalAttention]:
    """The core attentions of this rank, in the order of their layers."""
    found = [module for model in model_chunks for module in model.modules() if isinstance(module, CausalAttention)]
    return sorted(found, key=lambda attention: attention.layer_number)


def release_autograd_graph(model_chunks: Sequence[Any]) -> None:
    """Drop the last autograd graph, which token dispatchers keep by their router's weights.

    Its hooks name the model, so the two would keep each other, and every process group, alive out of the garbage
    collector's sight.
    """
    for model in model_chunks:
        for module in model.modules():
            if isinstance(module, MoELayer):
                module.token_dispatcher.probs = module.token_dispatcher.routing_map = None


def _forward(global_count: torch.Tensor, iterator: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
    """Megatron's forward step: this micro-batch's share of the loss on the last stage, and how to report it."""
    batch = next(iterator)
    positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens)
    # Megatron hands its attention mask to every layer as it is; ours is the documents, which are much smaller.
    scale = batch.loss_mask / global_count
    output = model(batch.tokens, positions, batch.documents, labels=batch.labels, loss_mask=scale)

    def reduce(loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Schedules divide what they are given in place, so the report is a copy.
        return loss, torch.zeros((), dtype=torch.int, device=loss.device), loss.detach().clone()

    return output, reduce


@dataclass(frozen=True)
class StepResult:
    """What one training step did. Equal on every rank."""

    loss: float
    aux_loss: float
    """Mean over sequences of the auxiliary loss, summed over layers, without its coefficient."""
    gradient_norm: float
    skipped: bool
    """Loss or gradient was not finite, or a spike was not to count: nothing was changed."""
    is_spike: bool
    """The loss was finite, and above what it may be."""
    gradient_norms: dict[str, float]
    """By group of parameters."""
    update_rms: dict[str, float]
    """By group, the RMS of the update before the learning rate; empty when skipped."""
    max_load: float
    """Largest share of tokens an expert got, over all layers, in units of the even share."""
    dead_experts: int
    """Experts, over all layers, that got no token."""
    clipped_heads: int
    """Heads, over all layers, whose query and key weights `qk_clip` scaled down."""
    max_logits: tuple[float, ...]
    """Largest attention logit of each layer; infinite where one was not a number. With `qk_clip` that of the whole
    batch, else, in watched steps, that of the first micro-batch of every data-parallel rank; empty in others."""
    watched: MonitorValues | None = None

    @property
    def max_logit(self) -> float:
        """Largest over all layers."""
        return max(self.max_logits, default=-math.inf)


def train_step(
    model_chunks: Sequence[GPTModel],
    optimizer: DistributedMuon,
    config: RunConfig,
    batches: Sequence[MicroBatch],
    moment: StepSchedule,
    spike_above: float = math.inf,
    before_update: Callable[[], None] = lambda: None,
) -> StepResult:
    """One optimizer step: gradients, clipping, update, query-key clip, router biases.

    A loss or gradient that is not finite on any rank skips the step everywhere, and so does a loss above `spike_above`
    if the run has a policy for spikes; router biases and their counts, which must not move in a skipped step, are
    therefore updated only after both are known.
    `before_update` is called before anything moves.
    """
    is_watched = is_due(moment.step, config.monitor.every_steps)
    clips = config.optimizer.qk_clip > 0
    optimizer.data_parallel.zero_grad_buffer()
    loss, _ = forward_backward(
        model_chunks, config, batches, recorded_batches=len(batches) if clips else int(is_watched)
    )
    gradient_norms = optimizer.gradient_norms()
    norm = math.hypot(*gradient_norms.values())
    broken = not (math.isfinite(norm) and math.isfinite(loss.item()))
    broken, is_above = _any_rank(broken, loss.item() > spike_above)
    is_spike = is_above and not broken
    skipped = broken or (is_spike and config.train.spike_policy != "none")
    before_update()
    head_group = parallel_state.get_model_parallel_group()  # tensor and pipeline: together they have every head once
    max_logits: tuple[float, ...] = ()
    if clips or is_watched:
        recorded = attentions(model_chunks)
        maxima = collect_max_logits(recorded, data_parallel_group(expert=False))
        max_logits = logits_by_layer(maxima, recorded, config.model, head_group)
    update_rms: dict[str, float] = {}
    clipped_heads = torch.zeros((), dtype=torch.int64, device=loss.device)
    if not skipped:
        factors = None
        if clips:
            gammas = logit_factors(maxima, config.optimizer.qk_clip)
            clipped_heads = (gammas < 1).sum()
            factors = row_factors(recorded, gammas, config.model)
        update_sums = optimizer.step(
            learning_rate=moment.learning_rate,
            weight_decay=config.optimizer.weight_decay,
            step=moment.step,
            gradient_norm=norm,
            row_factors=factors,
        )
        update_rms = root_mean_squares(update_sums)
    if clips:
        dist.all_reduce(clipped_heads, group=head_group)
    model_group = parallel_state.get_tensor_and_data_parallel_group()
    max_load, aux_loss, dead_experts, counts = torch.zeros(4, device=loss.device).unbind()
    if local := routers(model_chunks):
        counts = update_expert_bias(local, 0.0 if skipped else moment.router_bias_update_rate, model_group)
        max_load = (counts.max(-1).values / counts.mean(-1)).max()
        dead_experts = (counts == 0).sum().float()
        aux_loss = torch.stack([router.aux_loss for router in local]).sum() / moment.global_batch_size
        dist.all_reduce(aux_loss, group=model_group)
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    over_layers = torch.stack([aux_loss, dead_experts])
    dist.all_reduce(over_layers, group=pipeline_group)
    dist.all_reduce(max_load, op=dist.ReduceOp.MAX, group=pipeline_group)
    watched = collect_monitors(optimizer, config, moment.step, local, counts, pipeline_group) if is_watched else None
    return StepResult(
        loss=loss.item(),
        aux_loss=over_layers[0].item(),
        gradient_norm=norm,
        skipped=skipped,
        is_spike=is_spike,
        gradient_norms=gradient_norms,
        update_rms=update_rms,
        max_load=max_load.item(),
        dead_experts=int(over_layers[1].item()),
        clipped_heads=int(clipped_heads.item()),
        max_logits=max_logits,
        watched=watched,
    )


def _any_rank(*here: bool) -> tuple[bool, ...]:
    """Whether each holds on any rank of the world: ranks that judged differently would wait for each other forever."""
    flags = torch.tensor(here, dtype=torch.int32, device=torch.cuda.current_device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return tuple(bool(flag) for flag in flags.tolist())


def forward_backward(
    model_chunks: Sequence[GPTModel],
    config: RunConfig,
    batches: Sequence[MicroBatch],
    *,
    forward_only: bool = False,
    recorded_batches: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a global batch forward and, unless `forward_only`, backward, which adds to gradient sums and exchanges them.

    Args:
        batches: this data-parallel rank's micro-batches; all ranks must give the same number.
        recorded_batches: of how many of them, the first ones, attention keeps its largest logits.

    Returns:
        The mean language-model loss of the global batch and the number of tokens it is the mean of: float32 scalars
        equal on every rank.
    """
    data_group = parallel_state.get_data_parallel_group()
    count = torch.stack([batch.loss_mask.sum() for batch in batches]).sum()
    dist.all_reduce(count, group=data_group)
    global_count = count.clamp(min=1)
    if not forward_only:
        num_sequences = sum(len(batch.tokens) for batch in batches) * dist.get_world_size(data_group)
        for router in routers(model_chunks):
            router.aux_loss_weight = config.model.aux_loss_alpha / num_sequences
            router.aux_loss.zero_()
        for attention in attentions(model_chunks):
            attention.record(recorded_batches)
    schedule = get_forward_backward_func()
    losses = schedule(
        forward_step_func=partial(_forward, global_count),
        data_iterator=[iter(batches) for _ in model_chunks],
        model=list(model_chunks),
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1],
        micro_batch_size=batches[0].tokens.shape[0],
        forward_only=forward_only,
    )
    release_autograd_graph(model_chunks)
    loss = torch.stack(losses).sum() if losses else torch.zeros_like(global_count)
    dist.all_reduce(loss, group=data_group)
    # Earlier pipeline stages hold zero.
    dist.all_reduce(loss, group=parallel_state.get_pipeline_model_parallel_group())
    return loss, count
