"""Run folders as training leaves them, made up: the shapes of real curves, with what goes wrong in long runs."""

import json
import math
from dataclasses import dataclass

import numpy as np

GROUPS = ("attention_qo", "attention_kv", "experts", "shared_experts", "router", "dense", "embedding", "head", "norms")
SNAPSHOTS = 150
"""Different loads of experts in a history; steps between them repeat one, which makes long ones quick to write."""
TOKENS_PER_SEQUENCE = 8192
START_TIME = 1_795_000_000.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a made-up history has."""

    steps: int
    total_steps: int | None = None
    """What the recipe wants; by default `steps`, so that the run is finished."""
    layers: int = 3
    """With experts; one dense layer comes before them."""
    experts: int = 8
    seed: int = 0
    lr: float = 4.2e-4
    gpu: bool = True
    trouble: bool = False
    """Restarts, spikes, a rollback, skipped steps, dead experts."""
    sources: tuple[str, ...] = ("web", "code", "books")


def write_history(folder, shape):
    """Write config.yaml, metrics.jsonl and events.jsonl of a run into `folder`; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    total = shape.total_steps or shape.steps
    (folder / "config.yaml").write_text(recipe(folder.name, total, shape))
    loads = [snapshot(shape, number) for number in range(SNAPSHOTS)]
    random = np.random.default_rng(shape.seed)
    noise = random.normal(size=(shape.steps + 1, 4 + 3 * len(GROUPS)))
    trouble = trouble_of(shape)
    tokens, skipped = 0, 0
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, shape.steps + 1):
            entry, tokens, skipped = one_step(shape, total, step, noise[step], trouble, tokens, skipped)
            text = json.dumps(entry)
            if step % 10 == 0:
                text = text[:-1] + ", " + loads[(step - 1) * SNAPSHOTS // shape.steps] + "}"
            file.write(text + "\n")
    with (folder / "events.jsonl").open("w") as file:
        for event in events_of(shape, total, trouble):
            file.write(json.dumps(event) + "\n")
    return folder


def recipe(name, steps, shape):
    """A resolved recipe that `moonlight.config.run` accepts."""
    return f"""name: {name}
model: {{vocab_size: 163840, hidden_size: 2048, num_hidden_layers: {shape.layers + 1}, num_attention_heads: 16,
  first_k_dense_replace: 1, intermediate_size: 11264, 
  moe_intermediate_size: 1408, num_experts: {shape.experts}, num_experts_per_tok: 2}}
data: {{path: data, tokenizer: tokenizer, sequence_length: {TOKENS_PER_SEQUENCE}}}
schedule: {{lr: {shape.lr:.6f}, warmup_steps: {max(1, steps // 50)}}}
train: {{train_steps: {steps}, global_batch_size: 64, micro_batch_size: 1, validate_every_steps: 100,
  validation_sequences: 64, save_every_steps: 200, seed: {shape.seed}}}
"""


def trouble_of(shape):
    """Steps by what went wrong in them."""
    if not shape.trouble:
        return {"restart": [], "spike": [], "rollback": [], "skipped": []}
    at = {
        "restart": (0.21, 0.47, 0.475, 0.83),
        "spike": (0.31, 0.52, 0.66),
        "rollback": (0.66,),
        "skipped": (0.31, 0.52, 0.7),
    }
    return {kind: [max(2, int(share * shape.steps)) for share in shares] for kind, shares in at.items()}


def one_step(shape, total, step, noise, trouble, tokens, skipped):
    """One object of metrics.jsonl without its lists, and what counts on to the next."""
    share = step / total
    warmup = max(1, total // 50)
    batch = 64 if share < 0.1 else 128
    tokens += batch * TOKENS_PER_SEQUENCE
    decay = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1, share / 0.9)))
    lr = shape.lr * min(step / warmup, decay * (1 if share < 0.9 else max(0.0, (1 - share) / 0.1)))
    trend = 1.75 + 10.1 / (1 + 30 * step / total * 8) ** 0.62 - 0.07 * max(0, share - 0.9) * 10
    loss = trend + 0.02 * noise[0] + 0.004 * shape.seed
    norm = 0.25 + 2.5 / (1 + 300 * share) + 0.02 * abs(noise[1])
    if step in trouble["spike"]:
        loss, norm = loss + 2.6, norm * 30
    bad = step in trouble["skipped"] and step not in trouble["spike"]
    skipped += step in trouble["skipped"]
    seconds = 1.9 * batch / 64 * (1 + 0.02 * abs(noise[2]) + (3 if step % 997 == 0 else 0))
    entry = {
        "step": step,
        "consumed_tokens": tokens,
        "loss/train": None if bad else round(loss, 6),
        "loss/aux": 1.02 + 0.3 / (1 + 50 * share),
        "optim/grad_norm": None if bad else norm,
        "optim/lr": lr,
        "optim/global_batch_size": batch,
        "optim/router_bias_update_rate": 0.001 if share < 0.9 else 0.0,
        "optim/skipped_steps": skipped,
        "moe/max_load": 1.3 + 2.5 / (1 + 60 * share) + 0.05 * abs(noise[3]),
        "moe/dead_experts": int(4 * (share > 0.6)) if shape.trouble else 0,
        "attention/max_logit": 12 + 55 * share**0.7 + noise[3],
        "speed/tokens_per_second": batch * TOKENS_PER_SEQUENCE / seconds,
        "time/step_seconds": seconds,
        "loss/spike_score": float(noise[0]),
    }
    if total > 100:
        entry["stage"] = "warmup" if step <= warmup else "cosine" if share < 0.9 else "cooldown"
    if shape.gpu:
        entry |= {"speed/model_tflops": 790 / seconds * batch / 64, "speed/mfu": 0.8 / seconds * batch / 64}
        entry |= {"memory/peak_bytes": 61e9 + 2e9 * (share > 0.1), "memory/reserved_bytes": 70e9}
    for number, group in enumerate(GROUPS):
        near = 1 + 0.04 * noise[4 + number]
        entry[f"optim/grad_norm/{group}"] = None if bad else norm * near / (1 + number)
        entry[f"optim/update_rms/{group}"] = 0.2 * near * (1 + number / 40)
        if step % 10 == 0:
            entry[f"optim/weight_rms/{group}"] = 0.02 * (1 + 2 * share * (1 + number / 5)) * (1 + 0.1 * (near - 1))
        if step % 100 == 0 and number < 6:
            entry[f"optim/svd_entropy/{group}"] = 0.97 - 0.05 * share * (1 + number / 4)
    for number, source in enumerate(shape.sources):
        entry[f"data/tokens/{source}"] = int(tokens * (0.5, 0.3, 0.2)[number % 3])
    if step % max(1, total // 40) == 0 or step == total:
        entry["loss/validation"] = trend + 0.03
        entry |= {f"loss/validation/{name}": trend - 0.2 + 0.2 * n for n, name in enumerate(shape.sources)}
    if step == total:
        entry |= {"loss/held_out": trend + 0.031, "bits_per_byte/held_out": (trend + 0.031) / 2.9}
    if step % 200 == 0:
        entry |= {"time/save_pause_seconds": 0.9 + 0.1 * abs(noise[1]), "time/save_seconds": 31 + noise[1]}
    return entry, tokens, skipped


def loads_of(shape, number):
    """Loads of the experts in one snapshot: float64 (layers, experts), 1 being the even share."""
    random = np.random.default_rng([shape.seed, 17])
    share = number / SNAPSHOTS
    bias = random.normal(size=(shape.layers, shape.experts))
    drift = np.random.default_rng([shape.seed, number]).normal(size=bias.shape)
    load = np.exp(bias * 1.2 * np.exp(-6 * share) + 0.12 * drift + 0.1 * bias)
    if shape.trouble and share > 0.6:
        load[shape.layers // 2, [1, 3]] = 0
        load[-1, [0, shape.experts - 1]] = 0
    return load / load.mean(axis=1, keepdims=True)


def snapshot(shape, number):
    """The lists of one step as the inside of a JSON object."""
    load = loads_of(shape, number)
    logits = 10 + 50 * (number / SNAPSHOTS) ** 0.7 * np.linspace(0.4, 1, shape.layers + 1)
    lists = {
        "moe/load_by_expert": load.round(4).tolist(),
        "moe/max_load_by_layer": load.max(axis=1).round(4).tolist(),
        "moe/load_spread_by_layer": (load.std(axis=1) / load.mean(axis=1)).round(4).tolist(),
        "attention/max_logit_by_layer": logits.round(3).tolist(),
    }
    return json.dumps(lists)[1:-1]


def events_of(shape, total, trouble):
    """The objects of events.jsonl."""
    surroundings = {
        "host": "node-17",
        "world_size": 64,
        "layout": {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "expert_parallel_size": 8},
        "restart": 0,
        "environment": {"python": "3.11.9", "torch": "2.13.0", "device": "8 x H100 80 GB", "git": "7be75f3"},
    }
    clock = START_TIME
    yield {"time": clock, "event": "started", "step": 0, **surroundings}
    happened = [(step, kind) for kind, steps in trouble.items() for step in steps]
    happened += [(step, "saved") for step in range(200, shape.steps + 1, 200)]
    for step, kind in sorted(happened):
        common = {"time": clock + 2 * step, "step": step}
        if kind == "restart":
            yield common | {"event": "warning", "text": f"checkpoint step-{step:08d} is damaged: it is passed over"}
            yield common | {"event": "resumed", **surroundings, "restart": 1}
        elif kind == "spike":
            yield common | {"event": "spike", "loss": 4.9, "score": 31.5}
        elif kind == "rollback":
            yield common | {"event": "rolled back", "step": step - 100, "spike": step, "passed_over_sequences": 6400}
        elif kind == "skipped":
            yield common | {"event": "skipped", "loss": "nan", "gradient_norm": "inf"}
        else:
            yield common | {"event": "saving", "reason": "steps"}
            yield common | {"event": "saved", "text": f"checkpoint step-{step:08d}: 240 GB saved in 31 s"}
    if shape.steps >= total:
        yield {"time": clock + 2 * shape.steps, "event": "finished", "step": shape.steps}
