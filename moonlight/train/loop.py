"""The training loop: from a recipe to a trained checkpoint, resuming where a former process stopped."""

import contextlib
import dataclasses
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
from moonlight.errors import UserError
from moonlight.files import folder_lock
from moonlight.model.build import build_model
from moonlight.model.shards import initialize
from moonlight.optim.sharded import make_optimizer
from moonlight.timeline import Moment, Timeline
from moonlight.train import checkpoint, run_folder
from moonlight.train.checkpoint_files import TrainState, find, latest
from moonlight.train.metrics import LiveLine, Metrics
from moonlight.train.shared_folder import check_shared
from moonlight.train.step import StepResult, data_parallel_share, to_batches, train_step
from moonlight.train.validate import bits_per_byte, validate


def train(run: Run) -> None:
    """Train `run` on this process's part of the world, which must have been joined.

    Raises:
        UserError: the recipe does not fit the world, the data, the tokenizer or the run folder.
    """
    run.check_batches(dist.get_world_size())
    timeline = Timeline(run)
    folder = run_folder.path(run)
    manifests = run_folder.check_data(run)
    tokenizer = next(iter(manifests.values()))["tokenizer"]  # all have the same
    run_folder.check_initial_checkpoint(run, check_files=True)
    first_rank = dist.get_rank() == 0
    with contextlib.ExitStack() as stack:
        if first_rank:
            stack.enter_context(folder_lock(folder))
            run_folder.claim(folder, run)
        check_shared(folder)

        parallel.build_groups(run.parallel, run.train.seed, timedelta(seconds=run.train.hang_timeout_seconds))
        models = build_model(run)
        optimizer = make_optimizer(models, run)
        newest = latest(folder / "checkpoints")
        state = TrainState(consumed_sequences=timeline.first_sequence)
        if newest is not None:
            state = checkpoint.load(newest, run, optimizer)
        elif run.train.initial_checkpoint:
            checkpoint.load_weights(find(Path(run.train.initial_checkpoint)), run, optimizer)
        else:
            with optimizer.fill_masters() as state_to_fill:
                initialize(state_to_fill, run.model, run.train.seed)
        samples = open_training(run, manifests, run_folder.cache_folder(run))
        held_out = open_validation(run, manifests)

        total_steps, last_step = timeline.num_steps, run.train.stop_at_step or timeline.num_steps
        if first_rank:
            metrics = Metrics(folder, state.step)
            stack.callback(metrics.close)
            line = LiveLine(total_steps, state.step)
            stack.callback(line.close)
            if newest is not None:
                line.note(f"{folder}: going on after step {state.step} of {total_steps}")
        started, first_step = time.monotonic(), state.step

        while state.step < last_step:
            moment = timeline.at(state.step + 1)
            step = moment.step
            step_started = time.monotonic()
            mine = data_parallel_share(range(moment.first_sequence, moment.end))
            batches = to_batches([samples[number] for number in mine], run, tokenizer["eos_id"])
            result = train_step(models, optimizer, run, batches, moment)
            state = advance(state, run, moment, result)
            seconds = time.monotonic() - step_started

            entry = describe(state, run, moment, result, seconds) | samples.tokens_read(moment.end)
            if step % run.train.validate_every_steps == 0 or step == total_steps:
                entry["loss/validation"], parts = validate(models, run, held_out, run.train.validation_sequences)
                if len(parts) > 1:
                    entry |= {f"loss/validation/{name}": loss for name, loss in parts.items()}
            if step == total_steps:
                entry |= judge(validate(models, run, held_out)[0], held_out_counts(manifests.values()))
            if first_rank:
                metrics.write(entry)
                line.update(entry, (time.monotonic() - started) / (step - first_step) * (last_step - step))
                if "loss/validation" in entry:
                    line.note(f"step {step}: validation loss {entry['loss/validation']:.4f}")
                if result.skipped:
                    line.note(f"step {step}: skipped, its gradient norm is {result.gradient_norm}")
            if state.skipped_in_a_row >= run.train.max_skipped_steps_in_a_row:
                raise UserError(
                    f"{folder}: no step up to {step} had a finite gradient, {state.skipped_in_a_row} in a row "
                    f"(train.max_skipped_steps_in_a_row), so training stops; see loss/train and optim/grad_norm in "
                    f"metrics.jsonl, and try another schedule.lr under another name"
                )
            if step % run.train.save_every_steps == 0 or step == last_step:
                if first_rank:
                    metrics.sync()
                checkpoint.save(folder / "checkpoints", run, optimizer, state, tokenizer["sha256"])

        if first_rank:
            line.close()
            run_folder.summarize(folder, run, manifests)
        dist.barrier()


def advance(state: TrainState, run: Run, moment: Moment, result: StepResult) -> TrainState:
    """The state after a step."""
    return dataclasses.replace(
        state,
        step=moment.step,
        consumed_sequences=moment.end,
        consumed_tokens=moment.end * run.data.sequence_length,
        skipped_steps=state.skipped_steps + result.skipped,
        skipped_in_a_row=state.skipped_in_a_row + 1 if result.skipped else 0,
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
