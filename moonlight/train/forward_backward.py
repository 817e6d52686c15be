"""Forward and backward passes over a global batch, with a loss that does not depend on the layout.

The objective is the sum of the counted tokens' losses / counted tokens of the global batch, plus aux_loss_alpha x the
mean over the batch's sequences of the auxiliary loss, summed over layers. Each rank and micro-batch adds its part,
already divided by the global count, so gradients are only ever summed.
"""

from collections.abc import Iterator, Sequence
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
from moonlight.data.loader import PackedSample, Sample, collate
from moonlight.model.attention import CausalAttention
from moonlight.model.router import Router


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of this data-parallel rank. All tensors are [micro_batch_size, sequence_length]."""

    tokens: torch.Tensor
    """int64 ids."""
    labels: torch.Tensor
    """int64 ids: the token after each."""
    loss_mask: torch.Tensor
    """float32: 1 where the label counts, 0 elsewhere."""
    document_ids: torch.Tensor | None = None
    """int32: index of each token's document within its sequence. None: each sequence is one document."""


def local_samples(indices: Sequence[int]) -> Sequence[int]:
    """Return this data-parallel rank's contiguous part of the samples of a global batch."""
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    samples_per_rank = len(indices) // size
    return indices[rank * samples_per_rank : (rank + 1) * samples_per_rank]


def make_micro_batches(samples: Sequence[Sample], config: RunConfig, eos_id: int) -> list[MicroBatch]:
    """Split samples into micro-batches on this rank's device. `eos_id` ends a document of text."""
    device, size = torch.cuda.current_device(), config.train.micro_batch_size
    needs_documents = config.data.mask_documents or config.data.reset_positions
    batches = []
    for start in range(0, len(samples), size):
        batch = samples[start : start + size]
        tokens, labels, loss_mask = (tensor.to(device) for tensor in collate(batch))
        document_ids = None
        if packed := [sample.document_ids for sample in batch if isinstance(sample, PackedSample)]:
            document_ids = torch.from_numpy(np.stack(packed)).to(device)
        elif needs_documents:
            document_ids = compute_document_ids(tokens, eos_id)
        batches.append(MicroBatch(tokens, labels, loss_mask, document_ids))
    return batches


def compute_document_ids(tokens: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Return the index of each token's document within its sequence, from 0: a token after `eos_id` starts a new one.

    int32, of the shape of `tokens`.
    """
    ends = (tokens == eos_id).to(torch.int32)
    return ends.cumsum(1, dtype=torch.int32) - ends


def find_routers(model_chunks: Sequence[Any]) -> list[Router]:
    """Return the routers of this rank, in the order of their layers."""
    routers = [module for chunk in model_chunks for module in chunk.modules() if isinstance(module, Router)]
    return sorted(routers, key=lambda router: router.layer_number)


def find_attentions(model_chunks: Sequence[Any]) -> list[CausalAttention]:
    """Return the core attentions of this rank, in the order of their layers."""
    attentions = [module for chunk in model_chunks for module in chunk.modules() if isinstance(module, CausalAttention)]
    return sorted(attentions, key=lambda attention: attention.layer_number)


def forward_backward(
    model_chunks: Sequence[GPTModel],
    config: RunConfig,
    batches: Sequence[MicroBatch],
    *,
    forward_only: bool = False,
    recorded_batches: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a global batch forward and, unless `forward_only`, backward.

    The backward pass adds to the gradient sums and starts their exchange.

    Args:
        batches: this data-parallel rank's micro-batches; every rank must have the same number.
        recorded_batches: number of first micro-batches whose largest attention logits are recorded.

    Returns:
        Mean language-model loss of the global batch, and the number of tokens that it is the mean of: float32 scalars,
        equal on every rank.
    """
    data_group = parallel_state.get_data_parallel_group()
    count = torch.stack([batch.loss_mask.sum() for batch in batches]).sum()
    dist.all_reduce(count, group=data_group)
    global_count = count.clamp(min=1)
    if not forward_only:
        num_sequences = sum(len(batch.tokens) for batch in batches) * dist.get_world_size(data_group)
        for router in find_routers(model_chunks):
            router.aux_loss_weight = config.model.aux_loss_alpha / num_sequences
            router.aux_loss.zero_()
        for attention in find_attentions(model_chunks):
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
    # Only the last pipeline stage has a loss; the others add zero.
    dist.all_reduce(loss, group=parallel_state.get_pipeline_model_parallel_group())
    return loss, count


def _forward(global_count: torch.Tensor, iterator: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
    """Megatron's forward step: return this micro-batch's output and the function that reports its loss."""
    batch = next(iterator)
    positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens)
    # Megatron passes its attention mask unchanged to every layer. Ours is the document ids, which are much smaller.
    scale = batch.loss_mask / global_count
    output = model(batch.tokens, positions, batch.document_ids, labels=batch.labels, loss_mask=scale)

    def report_loss(loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Megatron's schedules divide the loss in place, so the report is a copy.
        return loss, torch.zeros((), dtype=torch.int, device=loss.device), loss.detach().clone()

    return output, report_loss


def release_autograd_graph(model_chunks: Sequence[Any]) -> None:
    """Free the last autograd graph, which token dispatchers keep through their router's probabilities.

    The graph's hooks refer to the model. Graph and model would keep each other, and every process group, alive where
    the garbage collector doesn't see it.
    """
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, MoELayer):
                module.token_dispatcher.probs = module.token_dispatcher.routing_map = None
