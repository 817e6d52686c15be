"""Loss spikes: score a step's loss against the losses before it, and roll the run back to a checkpoint."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

from moonlight.config.timeline import StepSchedule
from moonlight.config.train import TrainConfig
from moonlight.dist_checkpoint import lifecycle
from moonlight.dist_checkpoint.recovery import newest_valid_up_to
from moonlight.dist_checkpoint.state import TrainState
from moonlight.errors import UserError
from moonlight.train.setup import Run

FLOOR = 0.01
"""Added to the spread, in nats, so that small changes of a nearly constant loss are not spikes."""
MAD_TO_SIGMA = 1.4826
"""The standard deviation of normally distributed values is 1.4826 times their median absolute deviation."""


def _center_and_spread(recent: Sequence[float], window: int) -> tuple[float, float] | None:
    """Return center and spread of the last `window` losses; None if there are fewer."""
    if len(recent) < window:
        return None
    last = recent[-window:]
    center = statistics.median(last)
    return center, MAD_TO_SIGMA * statistics.median(abs(loss - center) for loss in last) + FLOOR


def spike_score(loss: float, recent: Sequence[float], window: int) -> float | None:
    """Return the robust standard score of `loss` over the last `window` losses: (loss - median) / (1.4826 MAD + 0.01).

    The score is None while there are fewer losses, and if `loss` is not finite.
    """
    statistic = _center_and_spread(recent, window)
    return (loss - statistic[0]) / statistic[1] if statistic and math.isfinite(loss) else None


def spike_limit(recent: Sequence[float], train_config: TrainConfig) -> float:
    """Return the loss above which a step is a spike; infinity until the window is full."""
    statistic = _center_and_spread(recent, train_config.spike_window)
    return statistic[0] + train_config.spike_threshold * statistic[1] if statistic else math.inf


def remember(recent: Sequence[float], loss: float, window: int) -> tuple[float, ...]:
    """Return the window of losses after one more loss."""
    return (*recent, loss)[-window:]


def roll_back(run: Run, state: TrainState, spike: StepSchedule) -> TrainState | None:
    """Load the newest valid checkpoint at least `rollback_steps` before a spike, and skip the data up to the spike.

    Later checkpoints are deleted, because their steps run again with other data. Collective.

    Returns:
        The state to resume from; None if the policy is not rollback or no such checkpoint exists, and nothing changed.

    Raises:
        UserError: `train.max_rollbacks_in_a_row` rollbacks did not pass the spike.
    """
    train_config = run.config.train
    if train_config.spike_policy != "rollback":
        return None
    run.checkpointer.wait()
    folder = newest_valid_up_to(run.checkpoints, spike.step - train_config.rollback_steps)
    if folder is None:
        return None
    if state.rollbacks_in_a_row >= train_config.max_rollbacks_in_a_row:
        raise UserError(
            f"{run.folder}: another loss spike at step {spike.step} after {state.rollbacks_in_a_row} "
            "rollbacks in a row (train.max_rollbacks_in_a_row), training stops; see loss/train and "
            "loss/spike_score in metrics.jsonl, and try a lower learning rate, or a higher train.spike_threshold, "
            "under another name"
        )
    lifecycle.delete_later(folder)
    loaded = lifecycle.load_checkpoint(folder, run.config, run.optimizer)
    # From the schedule, not the state: with --force, earlier steps may have had another batch size.
    first_sequence = run.schedule.at(loaded.step + 1).first_sequence
    passed_over = spike.end + state.passed_over_sequences - first_sequence
    run.watchdog.heartbeat()
    run.log.rolled_back(loaded.step, spike.step, passed_over)
    return dataclasses.replace(
        loaded,
        passed_over_sequences=passed_over,
        rollbacks_in_a_row=state.rollbacks_in_a_row + 1,
        last_spike_step=max(spike.step, state.last_spike_step),
    )
