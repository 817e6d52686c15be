"""The training loop: from a recipe to a trained checkpoint, resuming where a former process stopped."""

import contextlib
import dataclasses
import math
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moonlight import parallel
from moonlight.config import Run
from moonlight.data.loader import open_training, open_validation
from moonlight.data.manifest import held_out_counts
from moonlight.errors import CODE_STOPPED, UserError
from moonlight.files import folder_lock
from moonlight.model.build import build_model
from moonlight.model.shards import initialize
from moonlight.optim.sharded import make_optimizer
from moonlight.timeline import Moment, Timeline
from moonlight.train import checkpoint, run_folder, spikes
from moonlight.train.checkpoint_files import TrainState, find
from moonlight.train.checkpoint_recovery import newest_sound
from moonlight.train.events import Events
from moonlight.train.metrics import LiveLine, Metrics
from moonlight.train.saver import Saver
from moonlight.train.shared_folder import check_shared
from moonlight.train.step import StepResult, data_parallel_share, to_batches, train_step
from moonlight.train.triggers import Triggers
from moonlight.train.validate import bits_per_byte, validate
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
    folder = run_folder.path(run)
    checkpoints = folder / "checkpoints"
    manifests = run_folder.check_data(run)
    tokenizer = next(iter(manifests.values()))["tokenizer"]  # all have the same
    run_folder.check_initial_checkpoint(run)
    first_rank = dist.get_rank() == 0
    with contextlib.ExitStack() as stack:
        triggers = stack.enter_context(Triggers(run.train))
        watchdog = stack.enter_context(Watchdog(folder, run.train.hang_timeout_seconds))
        changed = []
        if first_rank:
            stack.enter_context(folder_lock(folder))
            changed = run_folder.claim(folder, run, force=force)
        events = Events(folder, writes=first_rank)
        check_shared(folder)

        parallel.build_groups(run.parallel, run.train.seed, group_timeout(run))
        models = build_model(run)
        optimizer = make_optimizer(models, run)
        newest, warnings = newest_sound(checkpoints)
        state = TrainState(consumed_sequences=timeline.first_sequence)
        if newest is not None:
            state = checkpoint.load(newest, run, optimizer, check_files=False)
        elif run.train.initial_checkpoint:
            checkpoint.load_weights(find(Path(run.train.initial_checkpoint)), run, optimizer)
        else:
            with optimizer.fill_masters() as state_to_fill:
                initialize(state_to_fill, run.model, run.train.seed)
        saver = Saver(checkpoints, run, optimizer, tokenizer["sha256"])
        stack.callback(saver.close)
        samples = open_training(run, manifests, run_folder.cache_folder(run))
        held_out = open_validation(run, manifests)

        total_steps, last_step = timeline.num_steps, run.train.stop_at_step or timeline.num_steps
        if first_rank:
            metrics = Metrics(folder, state.step)
            stack.callback(lambda: metrics.close())
            line = LiveLine(total_steps, state.step)
            stack.callback(line.close)
            for warning in warnings:
                line.note(warning)
            if newest is not None:
                line.note(f"{folder}: going on after step {state.step} of {total_steps}")
        events.add("resumed" if newest else "started", state.step, **_surroundings(run))
        if changed:
            events.add("forced", state.step, changed=changed)
        started, first_step = time.monotonic(), state.step

        while state.step < last_step:
            moment = timeline.at(state.step + 1)
            step = moment.step
            step_started = time.monotonic()
            first = moment.first_sequence + state.passed_over_sequences
            mine = data_parallel_share(range(first, first + moment.global_batch_size))
            batches = to_batches([samples[number] for number in mine], run, tokenizer["eos_id"])
            limit = spikes.limit(state.recent_losses, run.train)
            acts = run.train.spike_policy != "none"
            result = train_step(models, optimizer, run, batches, moment, limit if acts else math.inf)
            spike_score = spikes.score(result.loss, state.recent_losses, run.train.spike_window)
            seconds = time.monotonic() - step_started
            watchdog.finished(step)

            if result.loss > limit:
                events.add("spike", step, loss=result.loss, score=spike_score)
                if first_rank:
                    line.note(f"step {step}: loss spike, {result.loss:.4f} has score {spike_score:.1f}")
                back = None
                if run.train.spike_policy == "rollback":
                    saver.finish()
                    back = spikes.checkpoint_before(folder, run, step)
                if back is not None:
                    spikes.check_rollbacks(folder, run, step, state.rollbacks_in_a_row)
                    dist.barrier()  # every rank has found the same checkpoint before any is removed
                    state = spikes.go_back(back, run, optimizer, state, moment)
                    watchdog.alive()
                    events.add("rolled back", state.step, spike=step, passed_over_sequences=state.passed_over_sequences)
                    if first_rank:
                        line.note(f"step {step}: back to step {state.step}, passing over the data up to the spike")
                        metrics.close()
                        metrics = Metrics(folder, state.step)
                    started, first_step = time.monotonic(), state.step
                    continue

            state = advance(state, run, moment, result)
            entry = describe(state, run, moment, result, seconds) | saver.figures()
            entry |= samples.tokens_read(moment.end + state.passed_over_sequences)
            if spike_score is not None:
                entry["loss/spike_score"] = spike_score
            if step % run.train.validate_every_steps == 0 or step == total_steps:
                entry["loss/validation"], parts = validate(
                    models, run, held_out, watchdog.alive, run.train.validation_sequences
                )
                if len(parts) > 1:
                    entry |= {f"loss/validation/{name}": loss for name, loss in parts.items()}
            if step == total_steps:
                loss, _ = validate(models, run, held_out, watchdog.alive)
                entry |= judge(loss, held_out_counts(manifests.values()))
            if result.skipped:
                events.add("skipped", step, loss=str(result.loss), gradient_norm=str(result.gradient_norm))
            if first_rank:
                metrics.write(entry)
                line.update(entry, (time.monotonic() - started) / (step - first_step) * (last_step - step))
                if "loss/validation" in entry:
                    line.note(f"step {step}: validation loss {entry['loss/validation']:.4f}")
                if result.skipped:
                    line.note(f"step {step}: skipped, loss {result.loss}, gradient norm {result.gradient_norm}")
            if state.skipped_in_a_row >= run.train.max_skipped_steps_in_a_row:
                raise UserError(
                    f"{folder}: every step up to {step} was skipped, {state.skipped_in_a_row} in a row "
                    f"(train.max_skipped_steps_in_a_row), because loss or gradient was not finite or the loss was a "
                    f"spike, so training stops; see loss/train, loss/spike_score and optim/grad_norm in metrics.jsonl, "
                    f"and try another schedule.lr under another name"
                )
            wish = triggers.agree()
            if wish.reason in ("SIGTERM", "SIGUSR1"):
                events.add("signal", step, signal=wish.reason)
            is_regular = step % run.train.save_every_steps == 0 or step == last_step
            if is_regular or wish.reason:
                if first_rank:
                    metrics.sync()
                saver.save(state)
                triggers.saved()
                watchdog.alive()
                events.add("saving", step, reason=wish.reason or "steps")
            for message in saver.poll():
                events.add("save", step, text=message)
                line.note(message)
            if wish.stop and step < last_step:
                saver.finish()
                events.add("stopped", step)
                if first_rank:
                    line.note(f"{folder}: saved and stopped after step {step} on SIGTERM; the same command goes on")
                dist.barrier()
                raise SystemExit(CODE_STOPPED)
        saver.finish()

        if first_rank:
            for message in saver.poll():
                line.note(message)
            line.close()
            run_folder.summarize(folder, run, manifests)
        events.add("finished" if state.step >= total_steps else "stopped", state.step)
        dist.barrier()


def _surroundings(run: Run) -> dict[str, Any]:
    """Of a start, for events.jsonl: where the run goes on, cut how, and which restart of the launcher it is."""
    return {
        "host": socket.gethostname(),
        "world_size": dist.get_world_size(),
        "layout": {key: value for key, value in dataclasses.asdict(run.parallel).items() if key.endswith("_size")},
        "restart": int(os.environ.get(parallel.RESTART_COUNT, "0")),
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


def describe(state: TrainState, run: Run, moment: Moment, result: StepResult, seconds: float) -> dict[str, Any]:
    """One step's object in metrics.jsonl."""
    tokens = moment.global_batch_size * run.data.sequence_length
    entry: dict[str, Any] = {
        "step": state.step,
        "consumed_tokens": state.consumed_tokens,
        "loss/train": result.loss,
        "loss/aux": result.aux_loss,
        "optim/grad_norm": result.gradient_norm,
        "optim/lr": moment.learning_rate,
        "optim/global_batch_size": moment.global_batch_size,
        "optim/router_bias_update_rate": moment.router_bias_update_rate,
        "optim/skipped_steps": state.skipped_steps,
        "moe/max_load": result.max_load,
        "attention/max_logit": result.max_logit,
        "speed/tokens_per_second": tokens / seconds,
        "time/step_seconds": seconds,
    }
    if moment.stage:
        entry["stage"] = moment.stage
    if run.optimizer.qk_clip > 0:
        entry["attention/clipped_heads"] = result.clipped_heads
    entry |= {f"optim/update_rms/{name}": value for name, value in result.update_rms.items()}
    if torch.cuda.is_available():
        entry["memory/peak_bytes"] = torch.cuda.max_memory_allocated()
    return entry


def judge(loss: float, counts: dict[str, int]) -> dict[str, float]:
    """The loss over all held-out documents, every byte of them predicted, and the bits per byte it means."""
    bits = bits_per_byte(loss, counts["tokens"], counts["bytes"])
    return {"loss/held_out": loss, "bits_per_byte/held_out": bits}
