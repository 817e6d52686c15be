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
from moonlight.config.run import Run
from moonlight.config.timeline import Moment, Timeline
from moonlight.data.loader import open_training, open_validation
from moonlight.data.manifest import held_out_counts
from moonlight.dist_checkpoint import lifecycle
from moonlight.dist_checkpoint.async_save import Saver
from moonlight.dist_checkpoint.recovery import check, newest_sound
from moonlight.dist_checkpoint.state import TrainState
from moonlight.errors import CODE_STOPPED, UserError
from moonlight.files import folder_lock
from moonlight.model.build import build_model
from moonlight.model.sdpa import choices as attention_choices
from moonlight.model.shards import initialize
from moonlight.optim.distributed_muon import make_optimizer
from moonlight.train import run_folder, spikes
from moonlight.train.run_log import Journal
from moonlight.train.shared_folder import check_shared
from moonlight.train.signals import Triggers
from moonlight.train.step import StepResult, data_parallel_share, to_batches, train_step
from moonlight.train.step_metrics import describe, environment, judge
from moonlight.train.validate import validate
from moonlight.train.wandb_log import check_installed
from moonlight.train.watchdog import GROUPS, Watchdog


def group_timeout(run: Run) -> timedelta:
    """After how long process groups give up: later than the watchdog, which says more."""
    return timedelta(seconds=GROUPS * run.train.hang_timeout_seconds)


def train(run: Run, *, force: bool = False) -> None:
    """Train `run` on this process's part of the world, which must have been joined.

    Args:
        force: go on with a run of other settings, as long as its model and optimizer are the same.

    Raises:
        UserError: the recipe does not fit the world, the data, the tokenizer or the run folder.
        SystemExit: with CODE_STOPPED, after a save, because of SIGTERM.
    """
    run.check_batches(dist.get_world_size())
    timeline = Timeline(run)
    check_installed(run)
    folder = run_folder.path(run)
    manifests = run_folder.check_data(run)
    tokenizer = next(iter(manifests.values()))["tokenizer"]  # all have the same
    if (initial := run_folder.check_initial_checkpoint(run)) is not None:
        check(initial)
    first_rank = dist.get_rank() == 0
    with contextlib.ExitStack() as stack:
        triggers = stack.enter_context(Triggers(run.train))
        watchdog = stack.enter_context(Watchdog(folder, run.train.hang_timeout_seconds))
        changed = []
        if first_rank:
            stack.enter_context(folder_lock(folder))
            changed = run_folder.claim(folder, run, force=force)
        check_shared(folder)

        parallel.build_groups(run.parallel, run.train.seed, group_timeout(run))
        models = build_model(run)
        optimizer = make_optimizer(models, run)
        newest, warnings = newest_sound(folder / "checkpoints")
        if newest is not None:
            state = lifecycle.load(newest, run, optimizer)
        else:
            state = TrainState(consumed_sequences=timeline.first_sequence)
            if initial is not None:
                lifecycle.load_weights(initial, run, optimizer)
            else:
                with optimizer.fill_masters() as masters:
                    initialize(masters, run.model, run.train.seed)
        saver = Saver(folder / "checkpoints", run, optimizer, tokenizer["sha256"])
        stack.callback(saver.close)
        samples = open_training(run, manifests, run_folder.cache_folder(run))
        held_out = open_validation(run, manifests)

        total_steps, last_step = timeline.num_steps, run.train.stop_at_step or timeline.num_steps
        journal = stack.enter_context(Journal(folder, run, state.step, total_steps, last_step, writes=first_rank))
        for warning in warnings:
            journal.event("warning", state.step, text=warning)
            journal.note(warning)
        if newest is not None:
            journal.note(f"{folder}: going on after step {state.step} of {total_steps}")
        journal.event("resumed" if newest else "started", state.step, **_surroundings(run))
        if changed:
            journal.event("forced", state.step, changed=changed)
            journal.note(f"{folder}: going on with other settings: {'; '.join(changed)}")

        while state.step < last_step:
            moment = timeline.at(state.step + 1)
            step = moment.step
            started = time.monotonic()
            first = moment.first_sequence + state.passed_over_sequences
            mine = data_parallel_share(range(first, first + moment.global_batch_size))
            batches = to_batches([samples[number] for number in mine], run, tokenizer["eos_id"])
            limit = spikes.limit(state.recent_losses, run.train)
            result = train_step(models, optimizer, run, batches, moment, limit, saver.before_update)
            seconds = time.monotonic() - started
            watchdog.finished(step)

            spike_score = spikes.score(result.loss, state.recent_losses, run.train.spike_window)
            if result.is_spike:
                journal.event("spike", step, loss=result.loss, score=spike_score)
                journal.note(f"step {step}: loss spike, {result.loss:.4f} has score {spike_score:.1f}")
                if run.train.spike_policy == "rollback":
                    saver.wait()
                    back = spikes.go_back(folder / "checkpoints", run, timeline, optimizer, state, moment)
                    if back is not None:
                        state = back
                        watchdog.alive()
                        journal.go_back(state.step, spike=step, passed_over_sequences=state.passed_over_sequences)
                        continue

            state = advance(state, run, moment, result)
            entry = describe(state, run, moment, result, seconds) | saver.figures()
            entry |= samples.tokens_read(moment.end + state.passed_over_sequences)
            if spike_score is not None:
                entry["loss/spike_score"] = spike_score
            if step % run.train.validate_every_steps == 0 or step == total_steps:
                loss, parts = validate(models, run, held_out, watchdog.alive, run.train.validation_sequences)
                entry["loss/validation"] = loss
                entry |= {f"loss/validation/{name}": its for name, its in parts.items() if len(parts) > 1}
            if step == total_steps:
                loss, _ = validate(models, run, held_out, watchdog.alive)
                entry |= judge(loss, None if run.data.conversations else held_out_counts(manifests.values()))
            journal.step(entry)
            if "loss/validation" in entry:
                journal.note(f"step {step}: validation loss {entry['loss/validation']:.4f}")
            if result.skipped:
                journal.event("skipped", step, loss=str(result.loss), gradient_norm=str(result.gradient_norm))
                reason = "a spike" if result.is_spike else "not finite"
                norm = result.gradient_norm
                journal.note(f"step {step}: skipped ({reason}), loss {result.loss:.4f}, gradient norm {norm:.4f}")
            check_skipped(folder, run, state)
            for text in attention_choices():
                journal.event("attention", step, text=text)
                journal.note(text)

            wish = triggers.agree()
            if wish.reason in ("SIGTERM", "SIGUSR1"):
                journal.event("signal", step, signal=wish.reason)
            is_regular = step % run.train.save_every_steps == 0 or step == last_step
            if is_regular or wish.reason:
                journal.sync()
                saver.save(state)
                triggers.saved()
                watchdog.alive()
                journal.event("saving", step, reason=wish.reason or "steps")
            _tell(saver, journal)
            if wish.stop and step < last_step:
                saver.finish()
                _tell(saver, journal)
                journal.event("stopped", step)
                journal.note(f"{folder}: saved and stopped after step {step} on SIGTERM; the same command goes on")
                dist.barrier()
                raise SystemExit(CODE_STOPPED)
        saver.finish()
        _tell(saver, journal)
        if state.step < total_steps:
            journal.note(f"{folder}: stopped after step {state.step} (train.stop_at_step); without it the run goes on")
        journal.event("finished" if state.step >= total_steps else "stopped", state.step)
        if first_rank:
            run_folder.summarize(folder, run, manifests)
        dist.barrier()


def _tell(saver: Saver, journal: Journal) -> None:
    """What became of saves since the last call."""
    for said in saver.poll():
        journal.event(said.event, said.step, text=said.text)
        journal.note(said.text)


def _surroundings(run: Run) -> dict[str, Any]:
    """Of a start, for events.jsonl: where the run goes on, cut how, and which restart of the launcher it is."""
    return {
        "host": socket.gethostname(),
        "world_size": dist.get_world_size(),
        "layout": {key: value for key, value in dataclasses.asdict(run.parallel).items() if key.endswith("_size")},
        "restart": int(os.environ.get(parallel.RESTART_COUNT, "0")),
        "environment": environment(),
    }


def advance(state: TrainState, run: Run, moment: Moment, result: StepResult) -> TrainState:
    """The state after a step."""
    return dataclasses.replace(
        state,
        step=moment.step,
        consumed_sequences=moment.end,
        consumed_tokens=moment.end * run.data.sequence_length,
        skipped_steps=state.skipped_steps + result.skipped,
        skipped_in_a_row=state.skipped_in_a_row + 1 if result.skipped else 0,
        rollbacks_in_a_row=state.rollbacks_in_a_row if moment.step <= state.last_spike_step else 0,
        recent_losses=state.recent_losses
        if result.skipped
        else spikes.remember(state.recent_losses, result.loss, run.train.spike_window),
    )


def check_skipped(folder: Path, run: Run, state: TrainState) -> None:
    """Raise UserError if too many steps were skipped in a row: nothing is learnt any more."""
    if state.skipped_in_a_row >= run.train.max_skipped_steps_in_a_row:
        raise UserError(
            f"{folder}: every step up to {state.step} was skipped, {state.skipped_in_a_row} in a row "
            f"(train.max_skipped_steps_in_a_row), because loss or gradient was not finite or the loss was a "
            f"spike, so training stops; see loss/train, loss/spike_score and optim/grad_norm in metrics.jsonl, "
            "and try a lower learning rate (schedule.lr, or stages.<name>.lr) under another name"
        )
