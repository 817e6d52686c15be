"""The training loop: from a recipe to a trained checkpoint, resuming where a former process stopped."""

import contextlib
import dataclasses
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moonlight import parallel
from moonlight.config.run import RunConfig
from moonlight.config.timeline import RunSchedule, StepSchedule
from moonlight.data.loader import build_train_dataset, build_val_datasets
from moonlight.data.manifest import held_out_counts
from moonlight.dist_checkpoint import lifecycle
from moonlight.dist_checkpoint.async_save import AsyncCheckpointer
from moonlight.dist_checkpoint.recovery import newest_valid, verify_checkpoint
from moonlight.dist_checkpoint.state import TrainState
from moonlight.errors import CODE_STOPPED, UserError
from moonlight.files import folder_lock
from moonlight.model.build import build_model
from moonlight.model.sdpa import pop_selections as attention_choices
from moonlight.model.shards import init_weights
from moonlight.optim.distributed_muon import build_optimizer
from moonlight.train import run_folder, spikes
from moonlight.train.run_log import RunLogger
from moonlight.train.shared_folder import check_shared
from moonlight.train.signals import SignalHandler
from moonlight.train.step import StepResult, local_samples, make_micro_batches, train_step
from moonlight.train.step_metrics import environment_info, held_out_metrics, step_metrics
from moonlight.train.validate import validate
from moonlight.train.wandb_log import check_installed
from moonlight.train.watchdog import GROUP_TIMEOUT_FACTOR, Watchdog


def group_timeout(config: RunConfig) -> timedelta:
    """After how long process groups give up: later than the watchdog, which says more."""
    return timedelta(seconds=GROUP_TIMEOUT_FACTOR * config.train.hang_timeout_seconds)


def train(config: RunConfig, *, force: bool = False) -> None:
    """Train `run` on this process's part of the world, which must have been joined.

    Args:
        force: go on with a run of other settings, as long as its model and optimizer are the same.

    Raises:
        UserError: the recipe does not fit the world, the data, the tokenizer or the run folder.
        SystemExit: with CODE_STOPPED, after a save, because of SIGTERM.
    """
    config.check_batches(dist.get_world_size())
    timeline = RunSchedule(config)
    check_installed(config)
    folder = run_folder.run_path(config)
    manifests = run_folder.check_data(config)
    tokenizer = next(iter(manifests.values()))["tokenizer"]  # all have the same
    if (initial := run_folder.check_initial_checkpoint(config)) is not None:
        verify_checkpoint(initial)
    first_rank = dist.get_rank() == 0
    with contextlib.ExitStack() as stack:
        triggers = stack.enter_context(SignalHandler(config.train))
        watchdog = stack.enter_context(Watchdog(folder, config.train.hang_timeout_seconds))
        changed = []
        if first_rank:
            stack.enter_context(folder_lock(folder))
            changed = run_folder.write_config(folder, config, force=force)
        check_shared(folder)

        parallel.init_model_parallel(config.parallel, config.train.seed, group_timeout(config))
        models = build_model(config)
        optimizer = build_optimizer(models, config)
        newest, warnings = newest_valid(folder / "checkpoints")
        if newest is not None:
            state = lifecycle.load_checkpoint(newest, config, optimizer)
        else:
            state = TrainState(consumed_sequences=timeline.first_sequence)
            if initial is not None:
                lifecycle.load_weights(initial, config, optimizer)
            else:
                with optimizer.loading_masters() as masters:
                    init_weights(masters, config.model, config.train.seed)
        saver = AsyncCheckpointer(folder / "checkpoints", config, optimizer, tokenizer["sha256"])
        stack.callback(saver.cancel)
        samples = build_train_dataset(config, manifests, run_folder.cache_folder(config))
        held_out = build_val_datasets(config, manifests)

        total_steps, last_step = timeline.num_steps, config.train.stop_at_step or timeline.num_steps
        journal = stack.enter_context(RunLogger(folder, config, state.step, total_steps, last_step, writes=first_rank))
        for warning in warnings:
            journal.log_event("warning", state.step, text=warning)
            journal.print_line(warning)
        if newest is not None:
            journal.print_line(f"{folder}: going on after step {state.step} of {total_steps}")
        journal.log_event("resumed" if newest else "started", state.step, **_surroundings(config))
        if changed:
            journal.log_event("forced", state.step, changed=changed)
            journal.print_line(f"{folder}: going on with other settings: {'; '.join(changed)}")

        while state.step < last_step:
            moment = timeline.at(state.step + 1)
            step = moment.step
            started = time.monotonic()
            first = moment.first_sequence + state.passed_over_sequences
            mine = local_samples(range(first, first + moment.global_batch_size))
            batches = make_micro_batches([samples[number] for number in mine], config, tokenizer["eos_id"])
            limit = spikes.spike_limit(state.recent_losses, config.train)
            result = train_step(models, optimizer, config, batches, moment, limit, saver.wait_until_staged)
            seconds = time.monotonic() - started
            watchdog.step_done(step)

            spike_score = spikes.spike_score(result.loss, state.recent_losses, config.train.spike_window)
            if result.is_spike:
                journal.log_event("spike", step, loss=result.loss, score=spike_score)
                journal.print_line(f"step {step}: loss spike, {result.loss:.4f} has score {spike_score:.1f}")
                if config.train.spike_policy == "rollback":
                    saver.wait()
                    back = spikes.roll_back(folder / "checkpoints", config, timeline, optimizer, state, moment)
                    if back is not None:
                        state = back
                        watchdog.heartbeat()
                        journal.rollback(state.step, spike=step, passed_over_sequences=state.passed_over_sequences)
                        continue

            state = advance(state, config, moment, result)
            entry = step_metrics(state, config, moment, result, seconds) | saver.pop_metrics()
            entry |= samples.tokens_read(moment.end + state.passed_over_sequences)
            if spike_score is not None:
                entry["loss/spike_score"] = spike_score
            if step % config.train.validate_every_steps == 0 or step == total_steps:
                loss, parts = validate(models, config, held_out, watchdog.heartbeat, config.train.validation_sequences)
                entry["loss/validation"] = loss
                entry |= {f"loss/validation/{name}": its for name, its in parts.items() if len(parts) > 1}
            if step == total_steps:
                loss, _ = validate(models, config, held_out, watchdog.heartbeat)
                entry |= held_out_metrics(
                    loss, None if config.data.conversations else held_out_counts(manifests.values())
                )
            journal.log_step(entry)
            if "loss/validation" in entry:
                journal.print_line(f"step {step}: validation loss {entry['loss/validation']:.4f}")
            if result.skipped:
                journal.log_event("skipped", step, loss=str(result.loss), gradient_norm=str(result.gradient_norm))
                reason = "a spike" if result.is_spike else "not finite"
                norm = result.gradient_norm
                journal.print_line(f"step {step}: skipped ({reason}), loss {result.loss:.4f}, gradient norm {norm:.4f}")
            check_skipped(folder, config, state)
            for text in attention_choices():
                journal.log_event("attention", step, text=text)
                journal.print_line(text)

            wish = triggers.poll_all_ranks()
            if wish.reason in ("SIGTERM", "SIGUSR1"):
                journal.log_event("signal", step, signal=wish.reason)
            is_regular = step % config.train.save_every_steps == 0 or step == last_step
            if is_regular or wish.reason:
                journal.flush()
                saver.save(state)
                triggers.reset_timer()
                watchdog.heartbeat()
                journal.log_event("saving", step, reason=wish.reason or "steps")
            _tell(saver, journal)
            if wish.stop and step < last_step:
                saver.finalize()
                _tell(saver, journal)
                journal.log_event("stopped", step)
                journal.print_line(
                    f"{folder}: saved and stopped after step {step} on SIGTERM; the same command goes on"
                )
                dist.barrier()
                raise SystemExit(CODE_STOPPED)
        saver.finalize()
        _tell(saver, journal)
        if state.step < total_steps:
            journal.print_line(
                f"{folder}: stopped after step {state.step} (train.stop_at_step); without it the run goes on"
            )
        journal.log_event("finished" if state.step >= total_steps else "stopped", state.step)
        if first_rank:
            run_folder.summarize(folder, config, manifests)
        dist.barrier()


def _tell(saver: AsyncCheckpointer, journal: RunLogger) -> None:
    """What became of saves since the last call."""
    for said in saver.pop_events():
        journal.log_event(said.event, said.step, text=said.text)
        journal.print_line(said.text)


def _surroundings(config: RunConfig) -> dict[str, Any]:
    """Of a start, for events.jsonl: where the run goes on, cut how, and which restart of the launcher it is."""
    return {
        "host": socket.gethostname(),
        "world_size": dist.get_world_size(),
        "layout": {key: value for key, value in dataclasses.asdict(config.parallel).items() if key.endswith("_size")},
        "restart": int(os.environ.get(parallel.RESTART_COUNT, "0")),
        "environment": environment_info(),
    }


def advance(state: TrainState, config: RunConfig, moment: StepSchedule, result: StepResult) -> TrainState:
    """The state after a step."""
    return dataclasses.replace(
        state,
        step=moment.step,
        consumed_sequences=moment.end,
        consumed_tokens=moment.end * config.data.sequence_length,
        skipped_steps=state.skipped_steps + result.skipped,
        skipped_in_a_row=state.skipped_in_a_row + 1 if result.skipped else 0,
        rollbacks_in_a_row=state.rollbacks_in_a_row if moment.step <= state.last_spike_step else 0,
        recent_losses=state.recent_losses
        if result.skipped
        else spikes.remember(state.recent_losses, result.loss, config.train.spike_window),
    )


def check_skipped(folder: Path, config: RunConfig, state: TrainState) -> None:
    """Raise UserError if too many steps were skipped in a row: nothing is learnt any more."""
    if state.skipped_in_a_row >= config.train.max_skipped_steps_in_a_row:
        raise UserError(
            f"{folder}: every step up to {state.step} was skipped, {state.skipped_in_a_row} in a row "
            f"(train.max_skipped_steps_in_a_row), because loss or gradient was not finite or the loss was a "
            f"spike, so training stops; see loss/train, loss/spike_score and optim/grad_norm in metrics.jsonl, "
            "and try a lower learning rate (schedule.lr, or stages.<name>.lr) under another name"
        )
