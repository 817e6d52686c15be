"""Validation: the mean loss over held-out tokens, and bits per byte of their text."""

import math
from collections.abc import Callable, Mapping, Sequence

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import torch
from megatron.core.models.gpt import GPTModel

from moonlight.config.run import RunConfig
from moonlight.data.loader import AnyValDataset
from moonlight.train.forward_backward import forward_backward, local_samples, make_micro_batches


@torch.no_grad()
def validate(
    model_chunks: Sequence[GPTModel],
    config: RunConfig,
    datasets: Mapping[str, AnyValDataset],
    heartbeat: Callable[[], None],
    max_sequences: int = 0,
) -> tuple[float, dict[str, float]]:
    """Return the mean loss in nats per token, over all sources and of each source. Collective.

    Args:
        datasets: held-out sequences by source.
        heartbeat: called after every batch.
        max_sequences: first sequences of each source to take; 0 takes every held-out token.
    """
    for chunk in model_chunks:
        chunk.eval()
    sums = {
        name: _sum_losses(model_chunks, config, dataset, heartbeat, max_sequences) for name, dataset in datasets.items()
    }
    for chunk in model_chunks:
        chunk.train()
    nats, tokens = map(sum, zip(*sums.values(), strict=True))
    return nats / tokens, {name: nats / tokens for name, (nats, tokens) in sums.items()}


def _sum_losses(
    model_chunks: Sequence[GPTModel],
    config: RunConfig,
    dataset: AnyValDataset,
    heartbeat: Callable[[], None],
    max_sequences: int,
) -> tuple[float, float]:
    """Return the sum of the losses in nats, and the number of tokens."""
    total = min(len(dataset), max_sequences) if max_sequences else len(dataset)
    nats = tokens = 0.0
    batch_size = config.train.global_batch_size
    for start in range(0, total, batch_size):
        indices = local_samples(range(start, start + batch_size))
        # Past the end, index len(dataset) is a sequence of padding.
        samples = [dataset[index if index < total else len(dataset)] for index in indices]
        batches = make_micro_batches(samples, config, dataset.eos_id)
        loss, count = forward_backward(model_chunks, config, batches, forward_only=True)
        nats += loss.item() * count.item()
        tokens += count.item()
        heartbeat()
    return nats, tokens


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """Return the bits per byte of a text of `num_bytes` bytes, given its mean loss in nats over `num_tokens` tokens."""
    return loss * num_tokens / (num_bytes * math.log(2))
