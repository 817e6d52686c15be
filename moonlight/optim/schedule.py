"""The learning rate as a function of the step. No torch."""

import math

from moonlight.config import Schedule


def learning_rate(schedule: Schedule, step: int, train_steps: int) -> float:
    """Learning rate of `step`, counted from 1: linear warm-up to `lr`, then the decay to `min_lr` at `train_steps`."""
    assert 1 <= step <= train_steps, (step, train_steps)
    if step <= schedule.warmup_steps:
        return schedule.lr * step / schedule.warmup_steps
    if schedule.decay == "constant":
        return schedule.lr
    done = (step - schedule.warmup_steps) / (train_steps - schedule.warmup_steps)
    remaining = 1 - done if schedule.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return schedule.min_lr + (schedule.lr - schedule.min_lr) * remaining
