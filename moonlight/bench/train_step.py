"""`moonlight bench train-step`: a whole training step beside transformers' DeepseekV3 with AdamW.

Both begin with the same weights and learn the same tokens. Each side is tried in several settings (precision, compiled
or not, one process with all cores or several), and the best of each counts: every setting is tried once, then the
best two take turns. A setting is a process or several (train_step_cases.py), so that no one's threads, memory or
compiled code is another's. The gate: first losses agree to what the precision allows, and the loss falls.

A step is that of the recipe's batch. Where that would take a CPU an hour, a part of the batch is timed and counted as
often as it fits, and the update, timed by itself, once.
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

from moonlight.bench.report import BenchResult, hardware, print_results, time_ratio, told_rounds
from moonlight.config.load import load_recipe
from moonlight.config.parallel import ParallelConfig
from moonlight.config.run import RunConfig
from moonlight.errors import UserError
from moonlight.files import write_json

BAR, AIM = 1.5, 2.5
FIRST_LOSS_TOLERANCE = 2e-3
"""Relative, of the first loss: what bfloat16 makes of it."""
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Workload:
    """A recipe, and how much of its batch is timed."""

    recipe: str
    overrides: dict[str, Any]
    batch_tokens: int
    """Of the recipe's step."""


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
    """How one side trains."""

    side: str
    """ours or peer."""
    dtype: str
    """float32, or bfloat16 with float32 masters (the peer: autocast)."""
    processes: int = 1
    expert_parallel_size: int = 1
    compiled: bool = False
    experts: str = "grouped_mm"
    optimizer: str = "adamw"

    def __str__(self) -> str:
        where = f"{self.processes} processes" if self.processes > 1 else "1 process"
        where += f", expert parallel {self.expert_parallel_size}" if self.expert_parallel_size > 1 else ""
        what = "compiled" if self.compiled else "eager"
        how = f"{self.optimizer}, " if self.side == "ours" else f"{what}, {self.experts}, "
        return f"{self.side}: {how}{self.dtype}, {where}"


def max_processes(config: RunConfig, cores: int) -> int:
    """One a core, or as many as the batch and the experts can be dealt out to evenly."""
    shared = math.gcd(config.train.global_batch_size, config.model.num_experts)
    return max(count for count in range(1, cores + 1) if shared % count == 0)


def settings(name: str, optimizer: str, processes: int) -> list[Setting]:
    """What is tried, in one process and in `processes`, which may be one too.

    0.92 billion parameters fit a machine of 24 GB once, not in every process.
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
    """What a setting's processes said: seconds of the first step, of every later one's two parts, and losses."""

    first_step: float
    """With compilation, where a setting has it: `_call` gives every benchmark a compiler's cache of its own."""
    forward_backward: list[float]
    update: list[float]
    losses: list[float]

    def step_seconds(self, parts: int) -> float:
        """Of a step of so many parts of a batch."""
        return parts * statistics.median(self.forward_backward) + statistics.median(self.update)


def bench_train_step(rounds: int, names: list[str], optimizer: str, json_path: Path | None = None) -> bool:
    """Measure, print the table, and return whether every gate and bar has passed."""
    if optimizer not in ("muon", "adamw"):
        raise UserError(f"--optimizer is {optimizer}: muon and adamw are accepted")
    if unknown := set(names) - WORKLOADS.keys():
        raise UserError(f"--model is {unknown.pop()}: {' and '.join(WORKLOADS)} are accepted")
    if torch.cuda.is_available():
        raise UserError("train-step is a benchmark of processors, but here is a GPU: hide it by CUDA_VISIBLE_DEVICES=")
    machine = hardware("cpu")
    figures: list[BenchResult] = []
    notes = []
    for name in names:
        found, said = _measure(name, optimizer, rounds, machine.cores)
        figures.append(found)
        notes += said
    return print_results("A training step", figures, machine, notes, json_path)


def _measure(name: str, optimizer: str, rounds: int, cores: int) -> tuple[BenchResult, list[str]]:
    workload = WORKLOADS[name]
    config = load_recipe(Path(workload.recipe), [f"{key}={value}" for key, value in workload.overrides.items()])
    config = replace(config, parallel=ParallelConfig())
    parts = workload.batch_tokens // (config.train.global_batch_size * config.data.sequence_length)
    processes = max_processes(config, cores)
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as place:
        folder = Path(place)
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
        for _ in told_rounds(rounds, warms_up=False):
            for setting, own in zip(best, times, strict=True):
                result = _call(setting, workload, config, folder)
                own.append(result.step_seconds(parts))
                gate = gate and _agree([*tried.values(), result])
    notes = [f"{name}, {setting}: {_words(result, parts)}" for setting, result in tried.items()]
    notes += [f"{name}, {setting}: the system killed it, as it does when memory runs out" for setting in too_large]
    title = f"{name}, {optimizer}, step of {workload.batch_tokens:,} tokens"
    return time_ratio(title, times[0], times[1], BAR, gate, "s", AIM), notes


def _words(result: SettingResult, parts: int) -> str:
    forward_backward, update = statistics.median(result.forward_backward), statistics.median(result.update)
    times = f"{parts} x {forward_backward:.3f}" if parts > 1 else f"{forward_backward:.3f}"
    whole = f"step {result.step_seconds(parts):.3f} s ({times} and update {update:.3f})"
    return f"{whole}; the very first {result.first_step:.1f} s; first loss {result.losses[0]:.5f}"


def _agree(results: list[SettingResult]) -> bool:
    """Whether all begin with the same loss, and learn."""
    first = results[0].losses[0]
    same = all(abs(result.losses[0] - first) <= FIRST_LOSS_TOLERANCE * first for result in results)
    return same and all(result.losses[-1] < result.losses[0] for result in results)


def make_weights(config: RunConfig, folder: Path) -> None:
    """Random weights as transformers draws them: `hf` in its own form, `checkpoint` in ours."""
    from checkpoints.hf_import import import_folder
    from moonlight.bench.export import make_source

    make_source(config.model, folder / "hf", "float32")
    import_folder(folder / "hf", folder / "checkpoint")


def _call(setting: Setting, workload: Workload, config: RunConfig, folder: Path) -> SettingResult:
    """Start the processes of a setting, and read what the first one writes.

    Raises:
        MemoryError: the system killed one of them.
    """
    each = config.train.global_batch_size // setting.processes
    changed = workload.overrides | {"train.micro_batch_size": each, "optimizer.name": setting.optimizer}
    changed |= {"train.dtype": setting.dtype, "schedule.lr": LEARNING_RATE, "schedule.min_lr": 0.0}
    overrides = [f"{key}={value}" for key, value in changed.items()]
    write_json(folder / "order.json", {"setting": asdict(setting), "recipe": workload.recipe, "overrides": overrides})
    rendezvous, answer = folder / "rendezvous", folder / "answer.json"
    for file in (rendezvous, answer):
        file.unlink(missing_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
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
