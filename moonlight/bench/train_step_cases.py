"""One process of a setting of `moonlight bench train-step`: trains a few steps and says how long each part took."""

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
from moonlight.bench.monitors import NEVER, random_batches
from moonlight.config.load import load_recipe
from moonlight.config.parallel import ParallelConfig
from moonlight.config.run import RunConfig

SECONDS = 4.0
"""Steps are timed for about so long, at least LEAST_STEPS of them, after one that does not count."""
MIN_STEPS = 2
MAX_STEPS = 30

Step = Callable[[Callable[[], None]], float]
"""A training step, which calls its argument after the backward pass, before what comes once a step however many
micro-batches it has (the norm of the gradient, clipping, the update), and returns the loss."""


def ours(config: RunConfig, setting: dict[str, Any], folder: Path) -> Step:
    """This project's step, as its loop takes it."""
    from moonlight.config.timeline import RunSchedule
    from moonlight.dist_checkpoint.lifecycle import load_weights
    from moonlight.model.build import build_model
    from moonlight.optim.distributed_muon import build_optimizer
    from moonlight.train.forward_backward import local_samples
    from moonlight.train.step import train_step

    layout = ParallelConfig(expert_parallel_size=setting["expert_parallel_size"])
    config = replace(config, parallel=layout, monitor=NEVER)
    parallel.init_model_parallel(layout, config.train.seed)
    models = build_model(config)
    optimizer = build_optimizer(models, config)
    load_weights(folder / "checkpoint", config, optimizer)
    batches = random_batches(config)
    mine = [batches[number] for number in local_samples(range(len(batches)))]
    moment = replace(RunSchedule(config).at(2), learning_rate=config.schedule.lr)  # type: ignore[union-attr]
    norms = optimizer.gradient_norms  # the first thing after the backward pass

    def step(between: Callable[[], None]) -> float:
        def gradient_norms() -> dict[str, float]:
            between()
            return norms()

        optimizer.gradient_norms = gradient_norms  # type: ignore[method-assign]
        return train_step(models, optimizer, config, mine, moment).loss

    return step


def peer(config: RunConfig, setting: dict[str, Any], folder: Path) -> Step:
    """transformers' model with torch's fused AdamW, each as its documentation has it."""
    from transformers import DeepseekV3ForCausalLM

    model: Any = DeepseekV3ForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, attn_implementation="sdpa")
    model.set_experts_implementation(setting["experts"])
    model.train()
    decay = config.optimizer.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.schedule.lr, weight_decay=decay, fused=True)  # type: ignore[union-attr]
    trained = torch.compile(model) if setting["compiled"] else model
    if parallel.world_size() > 1:
        trained = torch.nn.parallel.DistributedDataParallel(trained)
    batch = random_batches(config)[parallel.rank()]
    tokens, labels = batch.tokens.contiguous(), batch.labels.contiguous()
    low = setting["dtype"] == "bfloat16"

    def step(between: Callable[[], None]) -> float:
        with torch.autocast("cpu", torch.bfloat16) if low else contextlib.nullcontext():
            loss = trained(input_ids=tokens, labels=tokens, shift_labels=labels, use_cache=False).loss
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
    """Obey order.json of the folder; rank 0 writes answer.json there."""
    order = json.loads((folder / "order.json").read_text())
    setting = order["setting"]
    config = load_recipe(Path(order["recipe"]), order["overrides"])
    parallel.init_distributed(int(os.environ["OMP_NUM_THREADS"]))
    try:
        step = {"ours": ours, "peer": peer}[setting["side"]](config, setting, folder)
        middle = 0.0

        def between() -> None:
            nonlocal middle
            middle = time.perf_counter()

        first_step, forward_backward, update, losses = 0.0, [], [], []
        steps = MIN_STEPS
        number = 0
        while number <= steps:
            torch.distributed.barrier()
            started = time.perf_counter()
            losses.append(step(between))
            ended = time.perf_counter()
            if number:
                forward_backward.append(middle - started)
                update.append(ended - middle)
            else:  # it warms up, and may compile
                first_step = ended - started
            if number == 1:
                found = torch.tensor(SECONDS / (ended - started))
                torch.distributed.broadcast(found, 0)
                steps = int(found.clamp(MIN_STEPS, MAX_STEPS).item())
            number += 1
        if parallel.rank() == 0:
            answer = {"forward_backward": forward_backward, "update": update, "losses": losses}
            (folder / "answer.json").write_text(json.dumps(answer | {"first_step": first_step}))
    finally:
        parallel.destroy_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
