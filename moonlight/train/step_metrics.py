"""What metrics.jsonl says of a step, and events.jsonl of where a run goes on."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moonlight.config.run import RunConfig
from moonlight.config.timeline import StepSchedule
from moonlight.dist_checkpoint.state import TrainState
from moonlight.hardware import peak_flops_per_second
from moonlight.plan.flops import train_flops_per_token
from moonlight.train.monitors import MonitorValues
from moonlight.train.step import StepResult
from moonlight.train.validate import bits_per_byte

_PACKAGES = ("torch", "megatron-core", "transformers", "moonlight-stack")
_DIGITS = 4
"""Of figures by layer and by expert, of which there are thousands."""


def step_metrics(
    state: TrainState, config: RunConfig, moment: StepSchedule, result: StepResult, seconds: float
) -> dict[str, Any]:
    """One step's object in metrics.jsonl. Lists are by layer, of the experts' figures by layer that has experts."""
    tokens = moment.global_batch_size * config.data.sequence_length
    flops = train_flops_per_token(config.model, config.data.sequence_length) * tokens / seconds / dist.get_world_size()
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
        "speed/tokens_per_second": tokens / seconds,
        "speed/model_tflops": flops / 1e12,
        "time/step_seconds": seconds,
    }
    if config.model.has_experts:
        entry |= {"moe/max_load": result.max_load, "moe/dead_experts": result.dead_experts}
    if peak := peak_tflops(config):
        entry["speed/mfu"] = flops / 1e12 / peak
    if moment.stage:
        entry["stage"] = moment.stage
    if config.optimizer.qk_clip > 0:
        entry["attention/clipped_heads"] = result.clipped_heads
    if result.max_logits:
        entry["attention/max_logit"] = result.max_logit
    entry |= {f"optim/grad_norm/{name}": value for name, value in result.gradient_norms.items()}
    entry |= {f"optim/update_rms/{name}": value for name, value in result.update_rms.items()}
    if result.monitors:
        entry |= _describe_watched(result.monitors)
        entry["attention/max_logit_by_layer"] = [_short(value) for value in result.max_logits]
    return entry


def peak_tflops(config: RunConfig) -> float | None:
    """Of one process's device, in 10^12 FLOP/s: what the recipe says, or what the name of the GPU does."""
    if config.monitor.peak_tflops:
        return config.monitor.peak_tflops
    by_name = torch.cuda.is_available() and config.train.dtype == "bfloat16"
    known = peak_flops_per_second(torch.cuda.get_device_name()) if by_name else None
    return known / 1e12 if known else None


def _describe_watched(watched: MonitorValues) -> dict[str, Any]:
    entry: dict[str, Any] = {f"optim/weight_rms/{name}": value for name, value in watched.weight_rms.items()}
    entry |= {f"optim/svd_entropy/{name}": value for name, value in watched.svd_entropies.items()}
    spreads = []
    for loads in watched.loads:
        mean = sum(loads) / len(loads)
        spreads.append((sum((load - mean) ** 2 for load in loads) / len(loads)) ** 0.5)
    if watched.loads:  # a dense model has none
        entry |= {
            "moe/max_load_by_layer": [_short(max(loads)) for loads in watched.loads],
            "moe/load_spread_by_layer": [_short(spread) for spread in spreads],
            "moe/load_by_expert": [[_short(load) for load in loads] for loads in watched.loads],
        }
    return entry | {"memory/peak_bytes": watched.peak_memory_bytes}


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def held_out_metrics(loss: float, counts: dict[str, int] | None) -> dict[str, float]:
    """The loss over all held-out documents and, where every byte of them was predicted, the bits per byte it means.

    `counts` are those of the text; None for conversations, of which only a part is.
    """
    if counts is None:
        return {"loss/held_out": loss}
    bits = bits_per_byte(loss, counts["tokens"], counts["bytes"])
    return {"loss/held_out": loss, "bits_per_byte/held_out": bits}


def environment_info() -> dict[str, str]:
    """Versions and hardware of this process."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["CUDA"] = str(torch.version.cuda)
    else:
        found["device"] = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads a process"
    return found


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
