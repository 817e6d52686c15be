"""Loss spikes: how far a step's loss stands above the losses before it, and how far back a run goes because of one."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from moonlight.config import Run, Train
from moonlight.errors import UserError
from moonlight.optim.sharded import ShardedOptimizer
from moonlight.timeline import Moment
from moonlight.train import checkpoint
from moonlight.train.checkpoint_files import TrainState, complete_checkpoints

FLOOR = 0.01
"""Nats. Added to the spread, so that a loss which hardly moves does not make every ripple a spike."""
MAD_TO_SIGMA = 1.4826
"""Times the median absolute deviation, the standard deviation of normally distributed values."""


def _center_and_spread(recent: Sequence[float]) -> tuple[float, float]:
    center = statistics.median(recent)
    return center, MAD_TO_SIGMA * statistics.median(abs(loss - center) for loss in recent) + FLOOR


def score(loss: float, recent: Sequence[float], window: int) -> float | None:
    """Robust standard score of `loss` among the last `window` losses: (loss - median) / (1.4826 MAD + 0.01).

    None until there are so many, and for a loss that is not finite.
    """
    if len(recent) < window or not math.isfinite(loss):
        return None
    center, spread = _center_and_spread(recent)
    return (loss - center) / spread


def limit(recent: Sequence[float], train: Train) -> float:
    """The loss above which a step is a spike; infinite until the window is full."""
    if len(recent) < train.spike_window:
        return math.inf
    center, spread = _center_and_spread(recent)
    return center + train.spike_threshold * spread


def remember(recent: Sequence[float], loss: float, window: int) -> tuple[float, ...]:
    """The window after one more loss."""
    return (*recent, loss)[-window:]


def checkpoint_before(folder: Path, run: Run, step: int) -> Path | None:
    """The newest checkpoint that is at least `rollback_steps` before `step`, or None."""
    name = f"step-{step - run.train.rollback_steps:08d}"
    return next((there for there in reversed(complete_checkpoints(folder)) if there.name <= name), None)


def go_back(folder: Path, run: Run, optimizer: ShardedOptimizer, state: TrainState, spike: Moment) -> TrainState:
    """Load the checkpoint `folder`, and pass over the data of all steps after it up to and including `spike`.

    Later checkpoints are removed: their steps will be done again with other data. All ranks must call it.

    Raises:
        UserError: the run has gone back too often without getting past a spike.
    """
    if state.rollbacks_in_a_row >= run.train.max_rollbacks_in_a_row:
        raise UserError(
            f"{folder.parent.parent}: another loss spike at step {spike.step} after {state.rollbacks_in_a_row} "
            f"rollbacks in a row (train.max_rollbacks_in_a_row), so training stops; see loss/train and "
            f"loss/spike_score in metrics.jsonl, and try a lower learning rate, or a higher train.spike_threshold, "
            f"under another name"
        )
    checkpoint.forget_after(folder.parent, folder)
    back = checkpoint.load(folder, run, optimizer)
    return dataclasses.replace(
        back,
        passed_over_sequences=spike.end + state.passed_over_sequences - back.consumed_sequences,
        rollbacks_in_a_row=state.rollbacks_in_a_row + 1,
        last_spike_step=max(spike.step, state.last_spike_step),
    )
