"""Validation: the mean loss over held-out tokens, and bits per byte of their text."""

import math
from collections.abc import Callable, Mapping, Sequence

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import torch
from megatron.core.models.gpt import GPTModel

from moonlight.config.run import Run
from moonlight.data.loader import HeldOut
from moonlight.train.step import data_parallel_share, forward_backward, to_batches


@torch.no_grad()
def validate(
    models: Sequence[GPTModel],
    run: Run,
    sources: Mapping[str, HeldOut],
    alive: Callable[[], None],
    max_sequences: int = 0,
) -> tuple[float, dict[str, float]]:
    """Mean loss in nats per token, over all sources and over each.

    Takes the first `max_sequences` sequences of each source, or with 0 every held-out token. `alive` is called after
    every pass over a batch.
    """
    for model in models:
        model.eval()
    sums = {name: _sum_losses(models, run, samples, alive, max_sequences) for name, samples in sources.items()}
    for model in models:
        model.train()
    nats, tokens = map(sum, zip(*sums.values(), strict=True))
    return nats / tokens, {name: nats / tokens for name, (nats, tokens) in sums.items()}


def _sum_losses(
    models: Sequence[GPTModel],
    run: Run,
    samples: HeldOut,
    alive: Callable[[], None],
    max_sequences: int,
) -> tuple[float, float]:
    """Sum of the losses in nats, and number of tokens."""
    total = min(len(samples), max_sequences) if max_sequences else len(samples)
    nats = tokens = 0.0
    per_pass = run.train.global_batch_size
    for start in range(0, total, per_pass):
        numbers = range(start, start + per_pass)
        mine = [samples[number if number < total else len(samples)] for number in data_parallel_share(numbers)]
        batches = to_batches(mine, run, samples.eos_id)
        loss, count = forward_backward(models, run, batches, forward_only=True)
        nats += loss.item() * count.item()
        tokens += count.item()
        alive()
    return nats, tokens


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """Bits per byte of a text of `num_bytes` that was predicted as `num_tokens` with mean `loss` in nats."""
    return loss * num_tokens / (num_bytes * math.log(2))
