"""Synthetic run folders: curves shaped like real ones, with the faults of long runs."""

import json
import math
from dataclasses import dataclass

import numpy as np

GROUPS = ("attention_qo", "attention_kv", "experts", "shared_experts", "router", "dense", "embedding", "head", "norms")
SNAPSHOTS = 150
"""Number of distinct expert loads in a history. Steps between them repeat one, so that long histories are fast."""
TOKENS_PER_SEQUENCE = 8192
START_TIME = 1_795_000_000.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Properties of a synthetic history."""

    steps: int
    total_steps: int | None = None
    """Number of steps in the recipe; by default `steps`, so that the run is finished."""
    layers: int = 3
    """Number of MoE layers; one dense layer precedes them."""
    experts: int = 8
    seed: int = 0
    lr: float = 4.2e-4
    gpu: bool = True
    trouble: bool = False
    """Whether there are restarts, spikes, a rollback, skipped steps and dead experts."""
    sources: tuple[str, ...] = ("web", "code", "books")


def write_history(folder, shape):
    """Write config.yaml, metrics.jsonl and events.jsonl of a run into `folder`, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    total = shape.total_steps or shape.steps
    (folder / "config.yaml").write_text(recipe(folder.name, total, shape))
    loads = [snapshot(shape, index) for index in range(SNAPSHOTS)]
    random = np.random.default_rng(shape.seed)
    noise = random.normal(size=(shape.steps + 1, 4 + 3 * len(GROUPS)))
    trouble = fault_steps(shape)
    tokens, skipped = 0, 0
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, shape.steps + 1):
            entry, tokens, skipped = make_entry(shape, total, step, noise[step], trouble, tokens, skipped)
            text = json.dumps(entry)
            if step % 10 == 0:
                text = text[:-1] + ", " + loads[(step - 1) * SNAPSHOTS // shape.steps] + "}"
            file.write(text + "\n")
    with (folder / "events.jsonl").open("w") as file:
        for event in make_events(shape, total, trouble):
            file.write(json.dumps(event) + "\n")
    return folder


def recipe(name, steps, shape):
    """Return a resolved recipe that `moonlight.config.run` accepts."""
    return f"""name: {name}
model: {{vocab_size: 163840, hidden_size: 2048, num_hidden_layers: {shape.layers + 1}, num_attention_heads: 16,
  first_k_dense_replace: 1, intermediate_size: 11264, 
  moe_intermediate_size: 1408, num_experts: {shape.experts}, num_experts_per_tok: 2}}
data: {{path: data, tokenizer: tokenizer, sequence_length: {TOKENS_PER_SEQUENCE}}}
schedule: {{lr: {shape.lr:.6f}, warmup_steps: {max(1, steps // 50)}}}
train: {{train_steps: {steps}, global_batch_size: 64, micro_batch_size: 1, validate_every_steps: 100,
  validation_sequences: 64, save_every_steps: 200, seed: {shape.seed}}}
"""


def fault_steps(shape):
    """Return the steps of each kind of fault."""
    if not shape.trouble:
        return {"restart": [], "spike": [], "rollback": [], "skipped": []}
    fractions_by_kind = {
        "restart": (0.21, 0.47, 0.475, 0.83),
        "spike": (0.31, 0.52, 0.66),
        "rollback": (0.66,),
        "skipped": (0.31, 0.52, 0.7),
    }
    return {
        kind: [max(2, int(fraction * shape.steps)) for fraction in fractions]
        for kind, fractions in fractions_by_kind.items()
    }


def make_entry(shape, total, step, noise, trouble, tokens, skipped):
    """Return one object of metrics.jsonl without its lists, and the counters for the next step."""
    fraction = step / total
    warmup = max(1, total // 50)
    batch = 64 if fraction < 0.1 else 128
    tokens += batch * TOKENS_PER_SEQUENCE
    decay = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1, fraction / 0.9)))
    lr = shape.lr * min(step / warmup, decay * (1 if fraction < 0.9 else max(0.0, (1 - fraction) / 0.1)))
    trend = 1.75 + 10.1 / (1 + 30 * step / total * 8) ** 0.62 - 0.07 * max(0, fraction - 0.9) * 10
    loss = trend + 0.02 * noise[0] + 0.004 * shape.seed
    norm = 0.25 + 2.5 / (1 + 300 * fraction) + 0.02 * abs(noise[1])
    if step in trouble["spike"]:
        loss, norm = loss + 2.6, norm * 30
    is_not_finite = step in trouble["skipped"] and step not in trouble["spike"]
    skipped += step in trouble["skipped"]
    seconds = 1.9 * batch / 64 * (1 + 0.02 * abs(noise[2]) + (3 if step % 997 == 0 else 0))
    entry = {
        "step": step,
        "consumed_tokens": tokens,
        "loss/train": None if is_not_finite else round(loss, 6),
        "loss/aux": 1.02 + 0.3 / (1 + 50 * fraction),
        "optim/grad_norm": None if is_not_finite else norm,
        "optim/lr": lr,
        "optim/global_batch_size": batch,
        "optim/router_bias_update_rate": 0.001 if fraction < 0.9 else 0.0,
        "optim/skipped_steps": skipped,
        "moe/max_load": 1.3 + 2.5 / (1 + 60 * fraction) + 0.05 * abs(noise[3]),
        "moe/dead_experts": int(4 * (fraction > 0.6)) if shape.trouble else 0,
        "attention/max_logit": 12 + 55 * fraction**0.7 + noise[3],
        "speed/tokens_per_second": batch * TOKENS_PER_SEQUENCE / seconds,
        "time/step_seconds": seconds,
        "loss/spike_score": float(noise[0]),
    }
    if total > 100:
        entry["stage"] = "warmup" if step <= warmup else "cosine" if fraction < 0.9 else "cooldown"
    if shape.gpu:
        entry |= {"speed/model_tflops": 790 / seconds * batch / 64, "speed/mfu": 0.8 / seconds * batch / 64}
        entry |= {"memory/peak_bytes": 61e9 + 2e9 * (fraction > 0.1), "memory/reserved_bytes": 70e9}
    for index, group in enumerate(GROUPS):
        factor = 1 + 0.04 * noise[4 + index]
        entry[f"optim/grad_norm/{group}"] = None if is_not_finite else norm * factor / (1 + index)
        entry[f"optim/update_rms/{group}"] = 0.2 * factor * (1 + index / 40)
        if step % 10 == 0:
            entry[f"optim/weight_rms/{group}"] = 0.02 * (1 + 2 * fraction * (1 + index / 5)) * (1 + 0.1 * (factor - 1))
        if step % 100 == 0 and index < 6:
            entry[f"optim/svd_entropy/{group}"] = 0.97 - 0.05 * fraction * (1 + index / 4)
    for index, source in enumerate(shape.sources):
        entry[f"data/tokens/{source}"] = int(tokens * (0.5, 0.3, 0.2)[index % 3])
    if step % max(1, total // 40) == 0 or step == total:
        entry["loss/validation"] = trend + 0.03
        entry |= {f"loss/validation/{name}": trend - 0.2 + 0.2 * n for n, name in enumerate(shape.sources)}
    if step == total:
        entry |= {"loss/held_out": trend + 0.031, "bits_per_byte/held_out": (trend + 0.031) / 2.9}
    if step % 200 == 0:
        entry |= {"time/save_pause_seconds": 0.9 + 0.1 * abs(noise[1]), "time/save_seconds": 31 + noise[1]}
    return entry, tokens, skipped


def expert_loads(shape, index):
    """Return the expert loads of one snapshot: float64 (layers, experts), where 1 is the mean."""
    random = np.random.default_rng([shape.seed, 17])
    fraction = index / SNAPSHOTS
    bias = random.normal(size=(shape.layers, shape.experts))
    drift = np.random.default_rng([shape.seed, index]).normal(size=bias.shape)
    load = np.exp(bias * 1.2 * np.exp(-6 * fraction) + 0.12 * drift + 0.1 * bias)
    if shape.trouble and fraction > 0.6:
        load[shape.layers // 2, [1, 3]] = 0
        load[-1, [0, shape.experts - 1]] = 0
    return load / load.mean(axis=1, keepdims=True)


def snapshot(shape, index):
    """Return the lists of one step as JSON without the outer braces."""
    load = expert_loads(shape, index)
    logits = 10 + 50 * (index / SNAPSHOTS) ** 0.7 * np.linspace(0.4, 1, shape.layers + 1)
    lists = {
        "moe/load_by_expert": load.round(4).tolist(),
        "moe/max_load_by_layer": load.max(axis=1).round(4).tolist(),
        "moe/load_spread_by_layer": (load.std(axis=1) / load.mean(axis=1)).round(4).tolist(),
        "attention/max_logit_by_layer": logits.round(3).tolist(),
    }
    return json.dumps(lists)[1:-1]


def make_events(shape, total, trouble):
    """Yield the objects of events.jsonl."""
    run_info = {
        "host": "node-17",
        "world_size": 64,
        "layout": {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "expert_parallel_size": 8},
        "restart": 0,
        "environment": {"python": "3.11.9", "torch": "2.13.0", "device": "8 x H100 80 GB", "git": "7be75f3"},
    }
    clock = START_TIME
    yield {"time": clock, "event": "started", "step": 0, **run_info}
    event_steps = [(step, kind) for kind, steps in trouble.items() for step in steps]
    event_steps += [(step, "saved") for step in range(200, shape.steps + 1, 200)]
    for step, kind in sorted(event_steps):
        common = {"time": clock + 2 * step, "step": step}
        if kind == "restart":
            yield common | {"event": "warning", "text": f"checkpoint step-{step:08d} is damaged: it is passed over"}
            yield common | {"event": "resumed", **run_info, "restart": 1}
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
