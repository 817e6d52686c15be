"""Health check in one process of the run: measure, compare with the other processes, report problems."""

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
from pretrain.measure import Health, measure_clock, measure_collectives, measure_disk, measure_network, measure_process

TABLE_WIDTH = 160
"""Columns of the table if the output is not a terminal."""


def run_health_check(config: RunConfig, limits: argparse.Namespace) -> list[str]:
    """Measure this process and compare it with the others; rank 0 prints the table. Collective.

    Args:
        limits: parsed arguments of `pretrain.health`.

    Returns:
        The problems, one line a cause with the names of its hosts; the same list on every rank.

    Raises:
        UserError: the connection to another rank broke.
    """
    runs_dir, run_dir = Path(config.runs_folder), run_folder.run_path(config)
    health = measure_process(int(os.environ.get("LOCAL_RANK", "0")))
    for check in (
        lambda: config.check_batches(dist.get_world_size()),
        lambda: run_folder.check_data(run_folder.resolve_train_steps(config)),
        lambda: run_folder.check_initial_checkpoint(config),
        lambda: run_folder.check_resumable(run_dir, run_folder.resolve_train_steps(config), force=limits.force),
        lambda: make_folder(runs_dir),
        lambda: check_shared(runs_dir),
        lambda: measure_disk(health, runs_dir, limits.disk_megabytes << 20) if health.local_rank == 0 else None,
    ):
        _record_problem(health, check)
    processes = [("", 0)] * dist.get_world_size()
    dist.all_gather_object(processes, (health.host, health.local_rank))
    hosts = [host for host, _ in processes]
    nbytes = limits.megabytes << 20
    try:
        measure_clock(health, [rank for rank, (_, local_rank) in enumerate(processes) if rank and local_rank == 0])
        measure_network(health, hosts, nbytes)
        seconds = measure_collectives(nbytes)
        healths: list[Health] = [health] * len(hosts)
        dist.all_gather_object(healths, health)
    except RuntimeError as error:  # gloo's, and NCCL's DistBackendError
        raise UserError(
            f"{health.host}: rank {health.rank} lost its connection to the others in the health check "
            f"({str(error).splitlines()[0]}): check the network between the hosts"
        ) from error
    problems = find_problems(healths, limits)
    if dist.get_rank() == 0:
        console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
        console.print(health_table(healths))
        for name, value in seconds.items():
            speed = f"{nbytes / value / 1e9:.2f} GB/s"
            console.print(f"{name} of {limits.megabytes} MiB among {len(hosts)}: {value * 1e3:.1f} ms, {speed}")
        for problem in problems:
            console.print(f"wrong: {problem}", highlight=False, soft_wrap=True)
        if not problems:
            console.print(f"{len(set(hosts))} host(s), {len(hosts)} processes: nothing wrong")
    dist.barrier()  # torchrun stops the others when one exits with 1; the table must be printed before
    return problems


def _record_problem(health: Health, check: Callable[[], object]) -> None:
    """Run a check; record an error that the user can fix as a problem, and raise other errors."""
    try:
        check()
    except (UserError, OSError) as error:
        if (message := user_message(error)) is None:
            raise
        health.problems.append(message)


def find_problems(healths: list[Health], limits: argparse.Namespace) -> list[str]:
    """Return the problems, by the limits and by comparison of the processes, one line a cause with its hosts."""
    hosts_by_problem: dict[str, list[str]] = {}

    def add(health: Health, problem: str) -> None:
        hosts = hosts_by_problem.setdefault(problem, [])
        if health.host not in hosts:
            hosts.append(health.host)

    for health in healths:
        for problem in health.problems:
            add(health, problem)
    for name in sorted({name for health in healths for name in health.versions}):
        common = _most_common(health.versions.get(name, "missing") for health in healths)
        for health in healths:
            if (version := health.versions.get(name, "missing")) != common:
                add(health, f"{name} is {version}, but {common} on most hosts")
    gpus = getattr(limits, "gpus_per_node", _most_common(health.gpus for health in healths))
    for health in healths:
        if health.gpus != gpus:
            add(health, f"it has {health.gpus} GPUs, not {gpus}")
    for key, label in (("network_speed", "between processes"), ("disk_speed", "written to disk")):
        measured = [health for health in healths if getattr(health, key) is not None]
        median = statistics.median([getattr(health, key) for health in measured]) if measured else 0.0
        for host in dict.fromkeys(health.host for health in measured):
            worst = min((health for health in measured if health.host == host), key=lambda health: getattr(health, key))
            if (speed := getattr(worst, key)) < limits.slow_below * median:
                add(worst, f"slow, {speed / 1e9:.3f} GB/s {label} by rank {worst.rank}; median {median / 1e9:.3f} GB/s")
    for key, unit, minimum in (
        ("network_speed", "GB/s between processes", limits.min_network_gb_per_second),
        ("disk_speed", "GB/s written to disk", limits.min_disk_gb_per_second),
        ("free_disk", "GB free on the disk of the run folder", limits.min_free_disk_gb),
        ("free_memory", "GB of memory free", limits.min_free_memory_gb),
        ("free_gpu_memory", "GB of GPU memory free", limits.min_free_gpu_memory_gb),
    ):
        for health in healths:
            value = getattr(health, key)
            if value is not None and value / 1e9 < minimum:
                add(health, f"{value / 1e9:.3f} {unit}, less than {minimum}")
    for health in healths:
        if abs(health.clock_offset) > limits.max_clock_seconds:
            add(health, f"its clock is {health.clock_offset:+.3f} s relative to that of {healths[0].host}")
        if health.latency is not None and health.latency * 1e3 > limits.max_latency_ms:
            add(health, f"{health.latency * 1e3:.2f} ms for 8 bytes, more than {limits.max_latency_ms}")
    return [f"{', '.join(hosts)}: {problem}" for problem, hosts in hosts_by_problem.items()]


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def health_table(healths: list[Health]) -> Table:
    """Return a table with one row a host: the worst values of its processes."""
    table = Table()
    columns = ("host", "ranks", "GPUs", "network GB/s", "latency µs", "disk GB/s", "disk free GB", "memory free GB")
    for name in (*columns, "GPU free GB", "clock ms", "code"):
        table.add_column(name, justify="left" if name in ("host", "ranks", "code") else "right")
    for host in dict.fromkeys(health.host for health in healths):
        of_host = [health for health in healths if health.host == host]

        def worst(key: str, scale: float, digits: int, pick: Any = min, of_host: list[Health] = of_host) -> str:
            values = [value for health in of_host if (value := getattr(health, key)) is not None]
            return f"{pick(values) * scale:.{digits}f}" if values else "-"

        table.add_row(
            host,
            ",".join(str(health.rank) for health in of_host),
            worst("gpus", 1, 0),
            worst("network_speed", 1e-9, 2),
            worst("latency", 1e6, 0, max),
            worst("disk_speed", 1e-9, 2),
            worst("free_disk", 1e-9, 1),
            worst("free_memory", 1e-9, 1),
            worst("free_gpu_memory", 1e-9, 1),
            worst("clock_offset", 1e3, 1, lambda offsets: max(offsets, key=abs)),
            of_host[0].versions["code"],
        )
    return table
