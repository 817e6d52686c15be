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
from moonlight.config.parallel import Parallel
from moonlight.config.run import Run

SECONDS = 4.0
"""Steps are timed for about so long, at least LEAST_STEPS of them, after one that does not count."""
LEAST_STEPS = 2
MOST_STEPS = 30

Step = Callable[[Callable[[], None]], float]
"""A training step, which calls its argument after the backward pass, before what comes once a step however many
micro-batches it has (the norm of the gradient, clipping, the update), and returns the loss."""


def ours(run: Run, setting: dict[str, Any], folder: Path) -> Step:
    """This project's step, as its loop takes it."""
    from moonlight.config.timeline import Timeline
    from moonlight.dist_checkpoint.lifecycle import load_weights
    from moonlight.model.build import build_model
    from moonlight.optim.distributed_muon import make_optimizer
    from moonlight.train.step import data_parallel_share, train_step

    layout = Parallel(expert_parallel_size=setting["expert_parallel_size"])
    run = replace(run, parallel=layout, monitor=NEVER)
    parallel.build_groups(layout, run.train.seed)
    models = build_model(run)
    optimizer = make_optimizer(models, run)
    load_weights(folder / "checkpoint", run, optimizer)
    batches = random_batches(run)
    mine = [batches[number] for number in data_parallel_share(range(len(batches)))]
    moment = replace(Timeline(run).at(2), learning_rate=run.schedule.lr)  # type: ignore[union-attr]
    norms = optimizer.gradient_norms  # the first thing after the backward pass

    def step(between: Callable[[], None]) -> float:
        def gradient_norms() -> dict[str, float]:
            between()
            return norms()

        optimizer.gradient_norms = gradient_norms  # type: ignore[method-assign]
        return train_step(models, optimizer, run, mine, moment).loss

    return step


def peer(run: Run, setting: dict[str, Any], folder: Path) -> Step:
    """transformers' model with torch's fused AdamW, each as its documentation has it."""
    from transformers import DeepseekV3ForCausalLM

    model: Any = DeepseekV3ForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, attn_implementation="sdpa")
    model.set_experts_implementation(setting["experts"])
    model.train()
    decay = run.optimizer.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.schedule.lr, weight_decay=decay, fused=True)  # type: ignore[union-attr]
    trained = torch.compile(model) if setting["compiled"] else model
    if parallel.world_size() > 1:
        trained = torch.nn.parallel.DistributedDataParallel(trained)
    batch = random_batches(run)[parallel.rank()]
    tokens, labels = batch.tokens.contiguous(), batch.labels.contiguous()
    low = setting["dtype"] == "bfloat16"

    def step(between: Callable[[], None]) -> float:
        with torch.autocast("cpu", torch.bfloat16) if low else contextlib.nullcontext():
            loss = trained(input_ids=tokens, labels=tokens, shift_labels=labels, use_cache=False).loss
        loss.backward()
        between()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip_grad_norm)
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
    run = load_recipe(Path(order["recipe"]), order["overrides"])
    parallel.join_world(int(os.environ["OMP_NUM_THREADS"]))
    try:
        step = {"ours": ours, "peer": peer}[setting["side"]](run, setting, folder)
        middle = 0.0

        def between() -> None:
            nonlocal middle
            middle = time.perf_counter()

        first_step, forward_backward, update, losses = 0.0, [], [], []
        steps = LEAST_STEPS
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
                steps = int(found.clamp(LEAST_STEPS, MOST_STEPS).item())
            number += 1
        if parallel.rank() == 0:
            answer = {"forward_backward": forward_backward, "update": update, "losses": losses}
            (folder / "answer.json").write_text(json.dumps(answer | {"first_step": first_step}))
    finally:
        parallel.leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
