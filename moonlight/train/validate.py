"""Validation: the mean loss over held-out tokens, and bits per byte of their text."""

import math
from collections.abc import Callable, Mapping, Sequence

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import torch
from megatron.core.models.gpt import GPTModel

from moonlight.config.run import RunConfig
from moonlight.data.loader import AnyValDataset
from moonlight.train.step import forward_backward, local_samples, make_micro_batches


@torch.no_grad()
def validate(
    model_chunks: Sequence[GPTModel],
    config: RunConfig,
    sources: Mapping[str, AnyValDataset],
    alive: Callable[[], None],
    max_sequences: int = 0,
) -> tuple[float, dict[str, float]]:
    """Mean loss in nats per token, over all sources and over each.

    Takes the first `max_sequences` sequences of each source, or with 0 every held-out token. `alive` is called after
    every pass over a batch.
    """
    for model in model_chunks:
        model.eval()
    sums = {name: _sum_losses(model_chunks, config, samples, alive, max_sequences) for name, samples in sources.items()}
    for model in model_chunks:
        model.train()
    nats, tokens = map(sum, zip(*sums.values(), strict=True))
    return nats / tokens, {name: nats / tokens for name, (nats, tokens) in sums.items()}


def _sum_losses(
    model_chunks: Sequence[GPTModel],
    config: RunConfig,
    samples: AnyValDataset,
    alive: Callable[[], None],
    max_sequences: int,
) -> tuple[float, float]:
    """Sum of the losses in nats, and number of tokens."""
    total = min(len(samples), max_sequences) if max_sequences else len(samples)
    nats = tokens = 0.0
    per_pass = config.train.global_batch_size
    for start in range(0, total, per_pass):
        numbers = range(start, start + per_pass)
        mine = [samples[number if number < total else len(samples)] for number in local_samples(numbers)]
        batches = make_micro_batches(mine, config, samples.eos_id)
        loss, count = forward_backward(model_chunks, config, batches, forward_only=True)
        nats += loss.item() * count.item()
        tokens += count.item()
        alive()
    return nats, tokens


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """Bits per byte of a text of `num_bytes` that was predicted as `num_tokens` with mean `loss` in nats."""
    return loss * num_tokens / (num_bytes * math.log(2))
