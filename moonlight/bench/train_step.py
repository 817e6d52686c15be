"""`moonlight bench train-step`: a full training step, compared with transformers' DeepseekV3 and AdamW.

Both sides start from the same weights and train on the same tokens. The benchmark tries each side once in several
settings (precision, compiled or eager, one process with all cores or several processes). Then the best settings of both
sides take turns. Each setting runs in separate processes (train_step_cases.py), so settings share no threads, memory or
compiled code. The gate: first losses agree within the tolerance of the precision, and the loss falls.

A step covers the recipe's batch. If that takes a CPU an hour, the benchmark times a part of the batch and multiplies
its forward and backward pass by the number of parts. The update counts once.
"""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moonlight.bench.report import BenchResult, hardware, iter_rounds, print_results, time_ratio
from moonlight.config.load import load_recipe
from moonlight.config.parallel import ParallelConfig
from moonlight.config.run import RunConfig
from moonlight.errors import UserError
from moonlight.files import write_json

BAR, AIM = 1.5, 2.5
FIRST_LOSS_TOLERANCE = 2e-3
"""Relative tolerance of the first loss, for bfloat16 rounding."""
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Workload:
    """A recipe, and the part of its batch that is timed."""

    recipe: str
    overrides: dict[str, Any]
    batch_tokens: int
    """Tokens of the recipe's full step."""


WORKLOADS = {
    "quickstart": Workload("configs/quickstart.yaml", {}, 2048),
    "0.1b": Workload(
        "configs/moonlight_family/a0.1b.yaml",
        {"data.sequence_length": 1024, "train.global_batch_size": 4, "train.micro_batch_size": 4},
        262_144,
    ),
}


@dataclass(frozen=True)
class Setting:
    """Training settings of one side. Field names are keys of order.json."""

    side: str
    """Either "ours" or "peer"."""
    dtype: str
    """Either "float32", or "bfloat16" with float32 master weights (peer: autocast)."""
    processes: int = 1
    expert_parallel_size: int = 1
    compiled: bool = False
    experts: str = "grouped_mm"
    optimizer: str = "adamw"

    def __str__(self) -> str:
        layout = f"{self.processes} processes" if self.processes > 1 else "1 process"
        layout += f", expert parallel {self.expert_parallel_size}" if self.expert_parallel_size > 1 else ""
        mode = "compiled" if self.compiled else "eager"
        details = f"{self.optimizer}, " if self.side == "ours" else f"{mode}, {self.experts}, "
        return f"{self.side}: {details}{self.dtype}, {layout}"


def max_processes(config: RunConfig, cores: int) -> int:
    """Return the largest number of processes, at most one per core, that divides the batch and the experts."""
    divisor = math.gcd(config.train.global_batch_size, config.model.num_experts)
    return max(count for count in range(1, cores + 1) if divisor % count == 0)


def settings(name: str, optimizer: str, processes: int) -> list[Setting]:
    """Return the settings to try for a workload, in one process and in `processes` (which may be 1).

    The 0.92 billion parameters of "0.1b" fit once in a machine with 24 GB, but not in every process.
    """
    ours = [Setting("ours", dtype, optimizer=optimizer) for dtype in ("float32", "bfloat16")]
    peer = [
        Setting("peer", dtype, compiled=compiled, experts="grouped_mm")
        for dtype in ("float32", "bfloat16")
        for compiled in (False, True)
    ]
    if name == "0.1b":
        shared = replace(ours[1], processes=processes, expert_parallel_size=processes)
        return list(dict.fromkeys([ours[1], shared, *peer[2:]]))
    ours += [replace(setting, processes=processes) for setting in ours]
    ours += [replace(setting, expert_parallel_size=processes) for setting in ours[2:]]
    peer += [replace(setting, processes=processes) for setting in peer[2:]]
    return list(dict.fromkeys([*ours, *peer, replace(peer[2], experts="eager")]))


@dataclass(frozen=True)
class SettingResult:
    """Times in seconds and losses of one setting. Field names are keys of answer.json."""

    first_step: float
    """Including compilation, if any: the compiler cache of a benchmark starts empty."""
    forward_backward: list[float]
    """Seconds of each step after the first."""
    update: list[float]
    """Seconds of each step after the first."""
    losses: list[float]

    def step_seconds(self, parts: int) -> float:
        """Return median seconds of a step whose batch has `parts` parts."""
        return parts * statistics.median(self.forward_backward) + statistics.median(self.update)


def bench_train_step(rounds: int, names: list[str], optimizer: str, json_path: Path | None = None) -> bool:
    """Run the benchmark, print its table, and return whether every result passed.

    Raises:
        UserError: the optimizer or a name is unknown, or the machine has a GPU.
    """
    if optimizer not in ("muon", "adamw"):
        raise UserError(f"--optimizer is {optimizer}: muon and adamw are accepted")
    if unknown := set(names) - WORKLOADS.keys():
        raise UserError(f"--model is {unknown.pop()}: {' and '.join(WORKLOADS)} are accepted")
    if torch.cuda.is_available():
        raise UserError("train-step is a CPU benchmark and this machine has a GPU: hide it by CUDA_VISIBLE_DEVICES=")
    machine = hardware("cpu")
    results: list[BenchResult] = []
    notes = []
    for name in names:
        result, result_notes = _measure(name, optimizer, rounds, machine.cores)
        results.append(result)
        notes += result_notes
    return print_results("A training step", results, machine, notes, json_path)


def _measure(name: str, optimizer: str, rounds: int, cores: int) -> tuple[BenchResult, list[str]]:
    workload = WORKLOADS[name]
    config = load_recipe(Path(workload.recipe), [f"{key}={value}" for key, value in workload.overrides.items()])
    config = replace(config, parallel=ParallelConfig())
    parts = workload.batch_tokens // (config.train.global_batch_size * config.data.sequence_length)
    processes = max_processes(config, cores)
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as temporary_folder:
        folder = Path(temporary_folder)
        make_weights(config, folder)
        tried, too_large = {}, []
        for setting in settings(name, optimizer, processes):
            try:
                tried[setting] = _call(setting, workload, config, folder)
            except MemoryError:
                too_large.append(setting)
        best = [
            min((s for s in tried if s.side == side), key=lambda s: tried[s].step_seconds(parts))
            for side in ("ours", "peer")
        ]
        times: list[list[float]] = [[], []]
        gate = _agree(list(tried.values()))
        for _ in iter_rounds(rounds, warms_up=False):
            for setting, setting_times in zip(best, times, strict=True):
                result = _call(setting, workload, config, folder)
                setting_times.append(result.step_seconds(parts))
                gate = gate and _agree([*tried.values(), result])
    notes = [f"{name}, {setting}: {_result_text(result, parts)}" for setting, result in tried.items()]
    notes += [f"{name}, {setting}: killed by the system, probably out of memory" for setting in too_large]
    title = f"{name}, {optimizer}, step of {workload.batch_tokens:,} tokens"
    return time_ratio(title, times[0], times[1], BAR, gate, "s", AIM), notes


def _result_text(result: SettingResult, parts: int) -> str:
    forward_backward, update = statistics.median(result.forward_backward), statistics.median(result.update)
    times = f"{parts} x {forward_backward:.3f}" if parts > 1 else f"{forward_backward:.3f}"
    step = f"step {result.step_seconds(parts):.3f} s ({times} and update {update:.3f})"
    return f"{step}; first step {result.first_step:.1f} s; first loss {result.losses[0]:.5f}"


def _agree(results: list[SettingResult]) -> bool:
    """Return whether all first losses agree and all losses fall."""
    first = results[0].losses[0]
    same = all(abs(result.losses[0] - first) <= FIRST_LOSS_TOLERANCE * first for result in results)
    return same and all(result.losses[-1] < result.losses[0] for result in results)


def make_weights(config: RunConfig, folder: Path) -> None:
    """Write random weights, initialized by transformers: `hf` is its format, `checkpoint` ours."""
    from checkpoints.hf_import import import_folder
    from moonlight.bench.export import make_source

    make_source(config.model, folder / "hf", "float32")
    import_folder(folder / "hf", folder / "checkpoint")


def _call(setting: Setting, workload: Workload, config: RunConfig, folder: Path) -> SettingResult:
    """Run the processes of a setting and read the result that rank 0 writes.

    Raises:
        MemoryError: the system killed a process.
        RuntimeError: a process failed.
    """
    micro_batch_size = config.train.global_batch_size // setting.processes
    values = workload.overrides | {"train.micro_batch_size": micro_batch_size, "optimizer.name": setting.optimizer}
    values |= {"train.dtype": setting.dtype, "schedule.lr": LEARNING_RATE, "schedule.min_lr": 0.0}
    overrides = [f"{key}={value}" for key, value in values.items()]
    write_json(folder / "order.json", {"setting": asdict(setting), "recipe": workload.recipe, "overrides": overrides})
    rendezvous, answer = folder / "rendezvous", folder / "answer.json"
    for file in (rendezvous, answer):
        file.unlink(missing_ok=True)
    cores = hardware("cpu").cores
    processes = []
    for rank in range(setting.processes):
        environment = os.environ | {
            "OMP_NUM_THREADS": str(max(1, cores // setting.processes)),
            "RANK": str(rank),
            "WORLD_SIZE": str(setting.processes),
            "LOCAL_RANK": str(rank),
            "MOONLIGHT_RENDEZVOUS_FILE": str(rendezvous.resolve()),
            "TORCHINDUCTOR_CACHE_DIR": str((folder / "compiled").resolve()),
        }
        command = [sys.executable, "-m", "moonlight.bench.train_step_cases", str(folder)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    errors = [process.communicate()[1].decode() for process in processes]
    if any(process.returncode == -signal.SIGKILL for process in processes):
        raise MemoryError(str(setting))
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{setting}: {''.join(errors)[-2000:]}")
    return SettingResult(**json.loads(answer.read_text()))
