"""Validation: the mean loss over held-out tokens, and bits per byte of their text."""

import math
from collections.abc import Callable, Sequence

import moonlight.cpu  # noqa: F401  (stand-ins, before Megatron)

import torch
from megatron.core.models.gpt import GPTModel

from moonlight.config import Run
from moonlight.data.loader import ValidationSamples
from moonlight.train.step import data_parallel_share, forward_backward, to_batches


@torch.no_grad()
def validate(
    models: Sequence[GPTModel],
    run: Run,
    samples: ValidationSamples,
    alive: Callable[[], None],
    max_sequences: int = 0,
) -> float:
    """Mean loss in nats per token over the first `max_sequences` sequences; 0 takes every held-out token.

    `alive` is called after every pass over a batch.
    """
    total = min(len(samples), max_sequences) if max_sequences else len(samples)
    for model in models:
        model.eval()
    nats = tokens = 0.0
    per_pass = run.train.global_batch_size
    for start in range(0, total, per_pass):
        numbers = range(start, start + per_pass)
        mine = [samples[number if number < total else len(samples)] for number in data_parallel_share(numbers)]
        batches = to_batches(mine, run.train.micro_batch_size)
        loss, count = forward_backward(models, run, batches, forward_only=True)
        nats += loss.item() * count.item()
        tokens += count.item()
        alive()
    for model in models:
        model.train()
    return nats / tokens


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """Bits per byte of a text of `num_bytes` that was predicted as `num_tokens` with mean `loss` in nats."""
    return loss * num_tokens / (num_bytes * math.log(2))
