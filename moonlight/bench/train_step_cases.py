"""One process of a setting of `moonlight bench train-step`: trains a few steps and reports the time of each part."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import torch

from moonlight import parallel
from moonlight.bench.monitors import NO_MONITORS, random_batches
from moonlight.config.load import load_recipe
from moonlight.config.parallel import ParallelConfig
from moonlight.config.run import RunConfig

TIMED_SECONDS = 4.0
"""Approximate duration of the timed steps, which follow one warm-up step: between MIN_STEPS and MAX_STEPS steps."""
MIN_STEPS = 2
MAX_STEPS = 30

Step = Callable[[Callable[[], None]], float]
"""A training step that returns the loss.

It calls its argument between the backward pass and the work that a step does once: gradient norm, clipping, update.
"""


def ours(config: RunConfig, setting: dict[str, Any], folder: Path) -> Step:
    """Return this project's step, as in its training loop."""
    from moonlight.config.timeline import RunSchedule
    from moonlight.dist_checkpoint.lifecycle import load_weights
    from moonlight.model.build import build_model
    from moonlight.optim.distributed_muon import build_optimizer
    from moonlight.train.forward_backward import local_samples
    from moonlight.train.step import train_step

    layout = ParallelConfig(expert_parallel_size=setting["expert_parallel_size"])
    config = replace(config, parallel=layout, monitor=NO_MONITORS)
    parallel.init_model_parallel(layout, config.train.seed)
    model_chunks = build_model(config)
    optimizer = build_optimizer(model_chunks, config)
    load_weights(folder / "checkpoint", config, optimizer)
    batches = random_batches(config)
    local_batches = [batches[index] for index in local_samples(range(len(batches)))]
    step_schedule = replace(RunSchedule(config).at(2), learning_rate=config.schedule.lr)  # type: ignore[union-attr]
    compute_norms = optimizer.gradient_norms  # the first call after the backward pass

    def step(between: Callable[[], None]) -> float:
        def gradient_norms() -> dict[str, float]:
            between()
            return compute_norms()

        optimizer.gradient_norms = gradient_norms  # type: ignore[method-assign]
        return train_step(model_chunks, optimizer, config, local_batches, step_schedule).loss

    return step


def peer(config: RunConfig, setting: dict[str, Any], folder: Path) -> Step:
    """Return a step of transformers' model with torch's fused AdamW, both as in their documentation."""
    from transformers import DeepseekV3ForCausalLM

    model: Any = DeepseekV3ForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, attn_implementation="sdpa")
    model.set_experts_implementation(setting["experts"])
    model.train()
    decay = config.optimizer.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.schedule.lr, weight_decay=decay, fused=True)  # type: ignore[union-attr]
    wrapped = torch.compile(model) if setting["compiled"] else model
    if parallel.world_size() > 1:
        wrapped = torch.nn.parallel.DistributedDataParallel(wrapped)
    batch = random_batches(config)[parallel.rank()]
    tokens, labels = batch.tokens.contiguous(), batch.labels.contiguous()
    uses_autocast = setting["dtype"] == "bfloat16"

    def step(between: Callable[[], None]) -> float:
        with torch.autocast("cpu", torch.bfloat16) if uses_autocast else contextlib.nullcontext():
            loss = wrapped(input_ids=tokens, labels=tokens, shift_labels=labels, use_cache=False).loss
        loss.backward()
        between()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if parallel.world_size() > 1:
            torch.distributed.all_reduce(loss)
            loss /= parallel.world_size()
        return loss.item()

    return step


def main(folder: Path) -> None:
    """Run the setting of order.json in `folder`. Rank 0 writes the result to answer.json there."""
    order = json.loads((folder / "order.json").read_text())
    setting = order["setting"]
    config = load_recipe(Path(order["recipe"]), order["overrides"])
    parallel.init_distributed(int(os.environ["OMP_NUM_THREADS"]))
    try:
        step = {"ours": ours, "peer": peer}[setting["side"]](config, setting, folder)
        update_started = 0.0

        def between() -> None:
            nonlocal update_started
            update_started = time.perf_counter()

        first_step, forward_backward, update, losses = 0.0, [], [], []
        num_steps = MIN_STEPS
        index = 0
        while index <= num_steps:
            torch.distributed.barrier()
            started = time.perf_counter()
            losses.append(step(between))
            ended = time.perf_counter()
            if index:
                forward_backward.append(update_started - started)
                update.append(ended - update_started)
            else:  # warms up and may compile
                first_step = ended - started
            if index == 1:
                estimate = torch.tensor(TIMED_SECONDS / (ended - started))
                torch.distributed.broadcast(estimate, 0)
                num_steps = int(estimate.clamp(MIN_STEPS, MAX_STEPS).item())
            index += 1
        if parallel.rank() == 0:
            answer = {"forward_backward": forward_backward, "update": update, "losses": losses}
            (folder / "answer.json").write_text(json.dumps(answer | {"first_step": first_step}))
    finally:
        parallel.destroy_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
