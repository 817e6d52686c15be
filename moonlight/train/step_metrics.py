"""Build the object of a step in metrics.jsonl, and the environment information in events.jsonl."""

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
"""Significant digits of values by layer and by expert, of which a step has thousands."""


def step_metrics(
    state: TrainState, config: RunConfig, schedule: StepSchedule, result: StepResult, seconds: float
) -> dict[str, Any]:
    """Return the object of one step in metrics.jsonl.

    Lists have one entry a layer; lists of expert loads have one entry a layer with experts.

    Args:
        seconds: wall time of the step.
    """
    tokens = schedule.global_batch_size * config.data.sequence_length
    flops = train_flops_per_token(config.model, config.data.sequence_length) * tokens / seconds / dist.get_world_size()
    entry: dict[str, Any] = {
        "step": state.step,
        "consumed_tokens": state.consumed_tokens,
        "loss/train": result.loss,
        "loss/aux": result.aux_loss,
        "optim/grad_norm": result.gradient_norm,
        "optim/lr": schedule.learning_rate,
        "optim/global_batch_size": schedule.global_batch_size,
        "optim/router_bias_update_rate": schedule.router_bias_update_rate,
        "optim/skipped_steps": state.skipped_steps,
        "speed/tokens_per_second": tokens / seconds,
        "speed/model_tflops": flops / 1e12,
        "time/step_seconds": seconds,
    }
    if config.model.has_experts:
        entry |= {"moe/max_load": result.max_load, "moe/dead_experts": result.dead_experts}
    if peak := peak_tflops(config):
        entry["speed/mfu"] = flops / 1e12 / peak
    if schedule.stage:
        entry["stage"] = schedule.stage
    if config.optimizer.qk_clip > 0:
        entry["attention/clipped_heads"] = result.clipped_heads
    if result.max_logits:
        entry["attention/max_logit"] = result.max_logit
    entry |= {f"optim/grad_norm/{name}": value for name, value in result.gradient_norms.items()}
    entry |= {f"optim/update_rms/{name}": value for name, value in result.update_rms.items()}
    if result.monitors:
        entry |= _monitor_metrics(result.monitors)
        entry["attention/max_logit_by_layer"] = [_round(value) for value in result.max_logits]
    return entry


def peak_tflops(config: RunConfig) -> float | None:
    """Return the peak of one process's device in TFLOP/s: from the recipe, or by the GPU's name; None if unknown."""
    if config.monitor.peak_tflops:
        return config.monitor.peak_tflops
    use_name = torch.cuda.is_available() and config.train.dtype == "bfloat16"
    peak = peak_flops_per_second(torch.cuda.get_device_name()) if use_name else None
    return peak / 1e12 if peak else None


def _monitor_metrics(monitors: MonitorValues) -> dict[str, Any]:
    entry: dict[str, Any] = {f"optim/weight_rms/{name}": value for name, value in monitors.weight_rms.items()}
    entry |= {f"optim/svd_entropy/{name}": value for name, value in monitors.svd_entropies.items()}
    spreads = []
    for loads in monitors.loads:
        mean = sum(loads) / len(loads)
        spreads.append((sum((load - mean) ** 2 for load in loads) / len(loads)) ** 0.5)
    if monitors.loads:  # a dense model has none
        entry |= {
            "moe/max_load_by_layer": [_round(max(loads)) for loads in monitors.loads],
            "moe/load_spread_by_layer": [_round(spread) for spread in spreads],
            "moe/load_by_expert": [[_round(load) for load in loads] for loads in monitors.loads],
        }
    return entry | {"memory/peak_bytes": monitors.peak_memory_bytes}


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def held_out_metrics(loss: float, counts: dict[str, int] | None) -> dict[str, float]:
    """Return the loss over all held-out documents and, if every byte was predicted, the bits per byte.

    Args:
        loss: nats per token.
        counts: tokens and bytes of the held-out text; None for conversations, of which only a part is predicted.
    """
    if counts is None:
        return {"loss/held_out": loss}
    bits = bits_per_byte(loss, counts["tokens"], counts["bytes"])
    return {"loss/held_out": loss, "bits_per_byte/held_out": bits}


def environment_info() -> dict[str, str]:
    """Return versions and hardware of this process."""
    info = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    for name in _PACKAGES:
        try:
            info[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        info["device"] = torch.cuda.get_device_name()
        info["CUDA"] = str(torch.version.cuda)
    else:
        info["device"] = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads a process"
    return info


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
