"""Loss spikes: how far a step's loss stands above the losses before it, and how far back a run goes because of one."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from moonlight.config.run import RunConfig
from moonlight.config.timeline import RunSchedule, StepSchedule
from moonlight.config.train import TrainConfig
from moonlight.dist_checkpoint import lifecycle
from moonlight.dist_checkpoint.recovery import newest_valid_up_to
from moonlight.dist_checkpoint.state import TrainState
from moonlight.errors import UserError
from moonlight.optim.distributed_muon import DistributedMuon

FLOOR = 0.01
"""Nats. Added to the spread, so that a loss which hardly moves does not make every ripple a spike."""
MAD_TO_SIGMA = 1.4826
"""Times the median absolute deviation, the standard deviation of normally distributed values."""


def _center_and_spread(recent: Sequence[float], window: int) -> tuple[float, float] | None:
    """Of the last `window` losses; None until there are so many."""
    if len(recent) < window:
        return None
    last = recent[-window:]
    center = statistics.median(last)
    return center, MAD_TO_SIGMA * statistics.median(abs(loss - center) for loss in last) + FLOOR


def spike_score(loss: float, recent: Sequence[float], window: int) -> float | None:
    """Robust standard score of `loss` among the last `window` losses: (loss - median) / (1.4826 MAD + 0.01).

    None until there are so many, and for a loss that is not finite.
    """
    found = _center_and_spread(recent, window)
    return (loss - found[0]) / found[1] if found and math.isfinite(loss) else None


def spike_limit(recent: Sequence[float], train_config: TrainConfig) -> float:
    """The loss above which a step is a spike; infinite until the window is full."""
    found = _center_and_spread(recent, train_config.spike_window)
    return found[0] + train_config.spike_threshold * found[1] if found else math.inf


def remember(recent: Sequence[float], loss: float, window: int) -> tuple[float, ...]:
    """The window after one more loss."""
    return (*recent, loss)[-window:]


def roll_back(
    checkpoints: Path,
    config: RunConfig,
    timeline: RunSchedule,
    optimizer: DistributedMuon,
    state: TrainState,
    spike: StepSchedule,
) -> TrainState | None:
    """Load the newest sound checkpoint at least `rollback_steps` before a spike, and pass over the data from there on.

    Later checkpoints are removed: their steps will be done again with other data. All ranks must call it.

    Returns:
        The state to go on from; None if there is no such checkpoint, and nothing was changed.

    Raises:
        UserError: the run has gone back too often without getting past a spike.
    """
    folder = newest_valid_up_to(checkpoints, spike.step - config.train.rollback_steps)
    if folder is None:
        return None
    if state.rollbacks_in_a_row >= config.train.max_rollbacks_in_a_row:
        raise UserError(
            f"{checkpoints.parent}: another loss spike at step {spike.step} after {state.rollbacks_in_a_row} "
            "rollbacks in a row (train.max_rollbacks_in_a_row), so training stops; see loss/train and "
            "loss/spike_score in metrics.jsonl, and try a lower learning rate, or a higher train.spike_threshold, "
            "under another name"
        )
    lifecycle.delete_later(folder)
    back = lifecycle.load_checkpoint(folder, config, optimizer)
    # By the timeline: a run forced to other batches counted the steps before in another way.
    first_sequence = timeline.at(back.step + 1).first_sequence
    return dataclasses.replace(
        back,
        passed_over_sequences=spike.end + state.passed_over_sequences - first_sequence,
        rollbacks_in_a_row=state.rollbacks_in_a_row + 1,
        last_spike_step=max(spike.step, state.last_spike_step),
    )
