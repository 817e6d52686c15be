"""The health check in one process of the world: measure, compare with the others, tell what is wrong."""

import argparse
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from moonlight.config.run import RunConfig
from moonlight.errors import UserError, user_message
from moonlight.files import make_folder
from moonlight.train import run_folder
from moonlight.train.shared_folder import check_shared
from pretrain.measure import (
    Health,
    measure_clock,
    measure_collectives,
    measure_disk,
    measure_network,
    measure_process,
)

WIDE = 160
"""Columns where there is no terminal to fit."""


def run_health_check(config: RunConfig, limits: argparse.Namespace) -> list[str]:
    """Measure this process's part of the world, which must have been joined; rank 0 prints the table.

    Returns:
        What is wrong, one line a cause with the hosts it is found on; the same list on every rank.
    """
    folder, folder_of_run = Path(config.runs_folder), run_folder.run_path(config)
    health = measure_process(int(os.environ.get("LOCAL_RANK", "0")))
    for test in (
        lambda: config.check_batches(dist.get_world_size()),
        lambda: run_folder.check_data(run_folder.resolve_train_steps(config)),
        lambda: run_folder.check_initial_checkpoint(config),
        lambda: run_folder.check_resumable(folder_of_run, run_folder.resolve_train_steps(config), force=limits.force),
        lambda: make_folder(folder),
        lambda: check_shared(folder),
        lambda: measure_disk(health, folder, limits.disk_megabytes << 20) if health.local_rank == 0 else None,
    ):
        _note(health, test)
    places = [("", 0)] * dist.get_world_size()
    dist.all_gather_object(places, (health.host, health.local_rank))
    hosts = [host for host, _ in places]
    nbytes = limits.megabytes << 20
    try:
        measure_clock(health, [rank for rank, (_, local_rank) in enumerate(places) if local_rank == 0])
        measure_network(health, hosts, nbytes)
        seconds = measure_collectives(nbytes)
        everyone: list[Health] = [health] * len(hosts)
        dist.all_gather_object(everyone, health)
    except RuntimeError as error:  # gloo's, and NCCL's DistBackendError
        raise UserError(
            f"{health.host}: rank {health.rank} lost its connection to the others in the health check "
            f"({str(error).splitlines()[0]}): check the network between the hosts"
        ) from error
    problems = find_problems(everyone, limits)
    if dist.get_rank() == 0:
        console = Console(width=None if sys.stdout.isatty() else WIDE)
        console.print(health_table(everyone))
        for name, value in seconds.items():
            speed = f"{nbytes / value / 1e9:.2f} GB/s"
            console.print(f"{name} of {limits.megabytes} MiB among {len(hosts)}: {value * 1e3:.1f} ms, {speed}")
        for problem in problems:
            console.print(f"wrong: {problem}", highlight=False, soft_wrap=True)
        if not problems:
            console.print(f"{len(set(hosts))} host(s), {len(hosts)} processes: nothing wrong")
    dist.barrier()  # torchrun ends the others when one ends with 1: the table must be printed by then
    return problems


def _note(health: Health, test: Callable[[], object]) -> None:
    """Let what is the user's to mend be told with everything else."""
    try:
        test()
    except (UserError, OSError) as error:
        if (message := user_message(error)) is None:
            raise
        health.problems.append(message)


def find_problems(everyone: list[Health], limits: argparse.Namespace) -> list[str]:
    """What is wrong, by the limits and by comparison with the others."""
    found: dict[str, list[str]] = {}

    def add(health: Health, problem: str) -> None:
        hosts = found.setdefault(problem, [])
        if health.host not in hosts:
            hosts.append(health.host)

    for health in everyone:
        for problem in health.problems:
            add(health, problem)
    for name in sorted({name for health in everyone for name in health.versions}):
        usual = _usual(health.versions.get(name, "missing") for health in everyone)
        for health in everyone:
            if (own := health.versions.get(name, "missing")) != usual:
                add(health, f"{name} is {own}, but {usual} on most")
    gpus = limits.gpus_per_node if limits.gpus_per_node is not None else _usual(health.gpus for health in everyone)
    for health in everyone:
        if health.gpus != gpus:
            add(health, f"it has {health.gpus} GPUs, not {gpus}")
    for key, label in (("network_speed", "between processes"), ("disk_speed", "written to disk")):
        known = [health for health in everyone if getattr(health, key) is not None]
        median = statistics.median([getattr(health, key) for health in known]) if known else 0.0
        for host in dict.fromkeys(health.host for health in known):
            worst = min((health for health in known if health.host == host), key=lambda health: getattr(health, key))
            if (speed := getattr(worst, key)) < limits.slow_below * median:
                add(worst, f"slow, {speed / 1e9:.3f} GB/s {label} by rank {worst.rank}; median {median / 1e9:.3f} GB/s")
    for key, unit, least in (
        ("network_speed", "GB/s between processes", limits.min_network_gb_per_second),
        ("disk_speed", "GB/s written to disk", limits.min_disk_gb_per_second),
        ("free_disk", "GB free on the disk of the run folder", limits.min_free_disk_gb),
        ("free_memory", "GB of memory free", limits.min_free_memory_gb),
        ("free_gpu_memory", "GB of GPU memory free", limits.min_free_gpu_memory_gb),
    ):
        for health in everyone:
            value = getattr(health, key)
            if value is not None and value / 1e9 < least:
                add(health, f"{value / 1e9:.3f} {unit}, fewer than {least}")
    for health in everyone:
        if abs(health.clock_offset) > limits.max_clock_seconds:
            add(health, f"its clock is {health.clock_offset:+.3f} s beside that of {everyone[0].host}")
        if health.latency is not None and health.latency * 1e3 > limits.max_latency_ms:
            add(health, f"{health.latency * 1e3:.2f} ms for 8 bytes, more than {limits.max_latency_ms}")
    return [f"{', '.join(hosts)}: {problem}" for problem, hosts in found.items()]


def _usual(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def health_table(everyone: list[Health]) -> Table:
    """A row for each host: the worst of its processes."""
    shown = Table()
    columns = ("host", "ranks", "GPUs", "network GB/s", "latency µs", "disk GB/s", "disk free GB", "memory free GB")
    for name in (*columns, "GPU free GB", "clock ms", "code"):
        shown.add_column(name, justify="left" if name in ("host", "ranks", "code") else "right")
    for host in dict.fromkeys(health.host for health in everyone):
        those = [health for health in everyone if health.host == host]

        def worst(key: str, scale: float, digits: int, pick: Any = min, those: list[Health] = those) -> str:
            values = [value for health in those if (value := getattr(health, key)) is not None]
            return f"{pick(values) * scale:.{digits}f}" if values else "-"

        shown.add_row(
            host,
            ",".join(str(health.rank) for health in those),
            worst("gpus", 1, 0),
            worst("network_speed", 1e-9, 2),
            worst("latency", 1e6, 0, max),
            worst("disk_speed", 1e-9, 2),
            worst("free_disk", 1e-9, 1),
            worst("free_memory", 1e-9, 1),
            worst("free_gpu_memory", 1e-9, 1),
            worst("clock_offset", 1e3, 1, lambda offsets: max(offsets, key=abs)),
            those[0].versions["code"],
        )
    return shown
