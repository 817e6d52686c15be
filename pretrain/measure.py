"""Measurements of the health check: on each host, and between the processes."""

import hashlib
import os
import platform
import shutil
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
PACKAGES = ("moonlight", "pretrain", "checkpoints", "eval")
PINGS = 16
"""Exchanges of a few bytes in one measurement."""
REPEATS = 5
"""Exchanges of many bytes in one measurement."""


@dataclass(kw_only=True)
class Health:
    """Measurements of one process, in bytes, seconds and bytes per second. None: not measured."""

    rank: int
    host: str
    local_rank: int
    versions: dict[str, str]
    gpus: int = 0
    free_memory: int = 0
    free_gpu_memory: int | None = None
    free_disk: int | None = None
    disk_speed: float | None = None
    network_speed: float | None = None
    """Best speed of its exchanges with processes of other hosts, or of this host if there is no other."""
    latency: float | None = None
    clock_offset: float = 0.0
    """Its clock minus that of rank 0."""
    problems: list[str] = field(default_factory=list)


def versions() -> dict[str, str]:
    """Return versions that must be equal on all hosts: Python, packages, driver, GPU, and a hash of our code."""
    result = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("megatron-core", "numpy", "transformers"):
        result[package] = metadata.version(package)
    driver = Path("/sys/module/nvidia/version")
    if driver.exists():
        result["NVIDIA driver"] = driver.read_text().strip()
    if torch.cuda.is_available():
        result["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        result["GPU"] = torch.cuda.get_device_name()
    digest = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    result["code"] = digest.hexdigest()[:12]
    return result


def measure_process(local_rank: int) -> Health:
    """Measure this process and its host, without communication."""
    health = Health(rank=dist.get_rank(), host=socket.gethostname(), local_rank=local_rank, versions=versions())
    health.gpus = torch.cuda.device_count()
    if torch.cuda.is_available():
        health.free_gpu_memory = torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    health.free_memory = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return health


def measure_disk(health: Health, folder: Path, nbytes: int) -> None:
    """Measure the disk speed: write, fsync and delete a file of `nbytes` bytes in `folder`, on all hosts together."""
    health.free_disk = shutil.disk_usage(folder).free
    file = folder / f".health-{health.host}-{os.getpid()}"
    block = os.urandom(1 << 20)
    try:
        started = time.perf_counter()
        with file.open("wb") as out:
            for _ in range(max(1, nbytes >> 20)):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        health.disk_speed = file.stat().st_size / (time.perf_counter() - started)
    except OSError as error:
        health.problems.append(f"{folder} cannot be written: {error.strerror}, {health.free_disk / 1e9:.3f} GB free")
    finally:
        file.unlink(missing_ok=True)


def measure_network(health: Health, hosts: list[str], nbytes: int) -> None:
    """Measure exchanges with ranks at distances of 1, 2, 4, ... hosts; keep best speed and latency. Collective.

    In a collective, every rank is as slow as the slowest one. The best of several partners separates a slow host from a
    host with a slow partner, unless there are only two hosts.

    Args:
        hosts: host of every rank.
        nbytes: size of an exchange.
    """
    by_host = [[rank for rank, host in enumerate(hosts) if host == name] for name in dict.fromkeys(hosts)]
    if len(by_host) > 1 and len({len(ranks) for ranks in by_host}) == 1:
        # One ring per local rank, each with one process of every host.
        ring = next(list(ring) for ring in zip(*by_host, strict=True) if health.rank in ring)
    else:
        ring = list(range(len(hosts)))
    if len(ring) == 1:
        return
    position = ring.index(health.rank)
    speeds, latencies = [], []
    distance = 1
    while distance < len(ring):
        to, source = ring[(position + distance) % len(ring)], ring[(position - distance) % len(ring)]
        speeds.append(nbytes / _exchange_seconds(nbytes, to, source, REPEATS))
        latencies.append(_exchange_seconds(8, to, source, PINGS))
        distance *= 2
    health.network_speed, health.latency = max(speeds), min(latencies)


def measure_collectives(nbytes: int) -> dict[str, float]:
    """Return the seconds of an all-reduce and an all-to-all of `nbytes` bytes a rank, measured in this process."""
    if dist.get_world_size() == 1:
        return {}
    values = torch.zeros(nbytes // 4 // dist.get_world_size() * dist.get_world_size(), device=_device())
    received = torch.empty_like(values)
    return {
        "all-reduce": _median(lambda: dist.all_reduce(values)),
        "all-to-all": _median(lambda: dist.all_to_all_single(received, values)),
    }


def measure_clock(health: Health, firsts: list[int]) -> None:
    """Measure this clock minus that of rank 0, from the exchange that took least time. Collective.

    Args:
        firsts: the first rank of every host but that of rank 0; they take turns.
    """
    stamp = torch.zeros(1, dtype=torch.float64, device=_device())
    for rank in firsts:
        best = (float("inf"), 0.0)
        for _ in range(PINGS):
            if health.rank == rank:
                sent_at = time.time()
                dist.send(stamp, 0)
                dist.recv(stamp, 0)
                remote_time = stamp.item()
                received_at = time.time()
                best = min(best, (received_at - sent_at, (sent_at + received_at) / 2 - remote_time))
            elif health.rank == 0:
                dist.recv(stamp, rank)
                dist.send(stamp.fill_(time.time()), rank)
        if health.rank == rank:
            health.clock_offset = best[1]


def _exchange_seconds(nbytes: int, to: int, source: int, repeats: int) -> float:
    sent = torch.zeros(nbytes, dtype=torch.uint8, device=_device())
    received = torch.zeros_like(sent)

    def exchange() -> None:
        transfers = [dist.P2POp(dist.isend, sent, to), dist.P2POp(dist.irecv, received, source)]
        for work in dist.batch_isend_irecv(transfers):
            work.wait()

    return _median(exchange, repeats)


def _median(action: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the median seconds of `action`, which all ranks start together; omit the first call, which connects."""
    seconds = []
    for _ in range(repeats + 1):
        dist.barrier()
        started = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
