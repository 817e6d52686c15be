"""The training loop: data, forward and backward, update, validation, log, checkpoint; again until the last step."""

import contextlib
import dataclasses
import time
from pathlib import Path

import torch.distributed as dist

from moonlight.config.run import RunConfig
from moonlight.config.timeline import StepSchedule
from moonlight.data.manifest import held_out_counts
from moonlight.dist_checkpoint.state import TrainState
from moonlight.errors import CODE_STOPPED, UserError
from moonlight.model.sdpa import pop_selections
from moonlight.train import run_folder, spikes
from moonlight.train.forward_backward import MicroBatch, local_samples, make_micro_batches
from moonlight.train.setup import Run, set_up_run
from moonlight.train.step import StepResult, train_step
from moonlight.train.step_metrics import held_out_metrics, step_metrics
from moonlight.train.validate import validate


def train(config: RunConfig, *, force: bool = False) -> None:
    """Train a recipe, or resume its run, on this process's part of an initialized world.

    Args:
        force: resume a run whose settings differ, as long as model and optimizer are the same.

    Raises:
        UserError: the recipe does not fit the world, the data, the tokenizer or the run folder, or training diverged.
        SystemExit: with CODE_STOPPED, after a save, because of SIGTERM.
    """
    with contextlib.ExitStack() as stack:
        run, state = set_up_run(config, stack, force=force)
        while state.step < run.last_step:
            started = time.monotonic()
            schedule = run.schedule.at(state.step + 1)
            batches = load_batches(run, state, schedule)
            spike_limit = spikes.spike_limit(state.recent_losses, config.train)
            before_update = run.checkpointer.wait_until_staged
            result = train_step(run.model_chunks, run.optimizer, config, batches, schedule, spike_limit, before_update)
            seconds = time.monotonic() - started
            run.watchdog.step_done(schedule.step)

            spike_score = spikes.spike_score(result.loss, state.recent_losses, config.train.spike_window)
            if result.is_spike:
                run.log.spike(schedule.step, result.loss, spike_score)
                if (earlier_state := spikes.roll_back(run, state, schedule)) is not None:
                    state = earlier_state
                    continue

            state = advance(state, config, schedule, result)
            metrics = step_metrics(state, config, schedule, result, seconds) | run.checkpointer.pop_metrics()
            metrics |= run.train_dataset.tokens_read(schedule.end + state.passed_over_sequences)
            if spike_score is not None:
                metrics["loss/spike_score"] = spike_score
            metrics |= validation_metrics(run, state.step)
            run.log.step(metrics)
            if result.skipped:
                run.log.skipped(state.step, result)
                check_skipped(run.folder, config, state)
            run.log.attention_backends(state.step, pop_selections())
            save_if_due(run, state)
        finish(run, state)


def load_batches(run: Run, state: TrainState, schedule: StepSchedule) -> list[MicroBatch]:
    """Return this data-parallel rank's micro-batches of a step."""
    first = schedule.first_sequence + state.passed_over_sequences
    indices = local_samples(range(first, first + schedule.global_batch_size))
    return make_micro_batches([run.train_dataset[index] for index in indices], run.config, run.eos_id)


def advance(state: TrainState, config: RunConfig, schedule: StepSchedule, result: StepResult) -> TrainState:
    """Return the state after a step."""
    return dataclasses.replace(
        state,
        step=schedule.step,
        consumed_sequences=schedule.end,
        consumed_tokens=schedule.end * config.data.sequence_length,
        skipped_steps=state.skipped_steps + result.skipped,
        skipped_in_a_row=state.skipped_in_a_row + 1 if result.skipped else 0,
        rollbacks_in_a_row=state.rollbacks_in_a_row if schedule.step <= state.last_spike_step else 0,
        recent_losses=state.recent_losses
        if result.skipped
        else spikes.remember(state.recent_losses, result.loss, config.train.spike_window),
    )


def validation_metrics(run: Run, step: int) -> dict[str, float]:
    """Validate if the step is due for it. The last step also measures all held-out text."""
    config, heartbeat, is_last = run.config, run.watchdog.heartbeat, step == run.total_steps
    metrics = {}
    if step % config.train.validate_every_steps == 0 or is_last:
        num_sequences = config.train.validation_sequences
        loss, source_losses = validate(run.model_chunks, config, run.val_datasets, heartbeat, num_sequences)
        metrics["loss/validation"] = loss
        if len(source_losses) > 1:
            metrics |= {f"loss/validation/{name}": source_loss for name, source_loss in source_losses.items()}
    if is_last:
        loss, _ = validate(run.model_chunks, config, run.val_datasets, heartbeat)
        counts = None if config.data.conversations else held_out_counts(run.manifests.values())
        metrics |= held_out_metrics(loss, counts)
    return metrics


def check_skipped(folder: Path, config: RunConfig, state: TrainState) -> None:
    """Raise UserError if too many consecutive steps were skipped: the model learns nothing anymore."""
    if state.skipped_in_a_row >= config.train.max_skipped_steps_in_a_row:
        raise UserError(
            f"{folder}: every step up to {state.step} was skipped, {state.skipped_in_a_row} in a row "
            f"(train.max_skipped_steps_in_a_row), because loss or gradient was not finite or the loss was a "
            f"spike, so training stops; see loss/train, loss/spike_score and optim/grad_norm in metrics.jsonl, "
            "and try a lower learning rate (schedule.lr, or stages.<name>.lr) under another name"
        )


def save_if_due(run: Run, state: TrainState) -> None:
    """Save a checkpoint if the step is due, on a signal, or if the timer expired; stop on SIGTERM."""
    step, reason = state.step, run.signals.poll_all_ranks()
    if reason in ("SIGTERM", "SIGUSR1"):
        run.log.event("signal", step, signal=reason)
    if step % run.config.train.save_every_steps == 0 or step == run.last_step or reason:
        run.log.flush()
        run.checkpointer.save(state)
        run.signals.reset_timer()
        run.watchdog.heartbeat()
        run.log.event("saving", step, reason=reason or "steps")
    run.log.save_events(run.checkpointer.pop_events())
    if reason == "SIGTERM" and step < run.last_step:
        run.checkpointer.finalize()
        run.log.save_events(run.checkpointer.pop_events())
        run.log.stopped_by_signal(step)
        dist.barrier()
        raise SystemExit(CODE_STOPPED)


def finish(run: Run, state: TrainState) -> None:
    """Wait for the last checkpoint, and write the run's summary."""
    run.checkpointer.finalize()
    run.log.save_events(run.checkpointer.pop_events())
    run.log.ended(state.step)
    if dist.get_rank() == 0:
        run_folder.summarize(run.folder, run.config, run.manifests)
    dist.barrier()
