"""Health check: one of several processes has other code, clock or disk; hosts that are slow or disconnected."""

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moonlight.errors import UserError
from pretrain.diagnose import find_problems
from pretrain.measure import PACKAGES, Health
from tests.support.bad_input import check_line
from tests.support.hosts import Hosts

ROOT = Path(__file__).parents[2]
PATIENCE_S = 400
QUICK = ("--megabytes", "1", "--disk-megabytes", "1", "--slow-below", "0", "--max-latency-ms", "10000")


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def environment(rank, world_size, head, port, tree=ROOT):
    """Return the environment of one process of a job without a launcher."""
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": "0",  # as if each process were on its own host
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": head,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(tree),
    }


def check(tiny_run, runs, *options):
    """Return the command of the health check for the tiny run."""
    return [sys.executable, "-m", "pretrain.health", tiny_run.recipe, f"runs_folder={runs}", *QUICK, *options]


def test_problems_are_reported_with_their_host_and_the_run_does_not_start(tiny_run, tmp_path):
    """The check reports that one of two processes runs other code with its clock 5 s ahead."""
    other = tmp_path / "other"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, other / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "moonlight/plan/flops.py").open("a") as file:
        file.write("# changed on one host\n")
    (other / "sitecustomize.py").write_text("import time\nright = time.time\ntime.time = lambda: right() + 5\n")
    port = free_port()
    command = check(tiny_run, tmp_path / "runs", "--gpus-per-node", 8, "data.path=/nowhere")
    processes = [
        subprocess.Popen(
            [str(part) for part in command],
            env=environment(rank, 2, "localhost", port, tree),
            cwd=tree,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, tree in enumerate((ROOT, other))
    ]
    outcomes = [(*process.communicate(timeout=PATIENCE_S), process.returncode) for process in processes]
    assert [code for *_, code in outcomes] == [1, 1], outcomes
    assert outcomes[1][0] == ""
    output, host = outcomes[0][0], socket.gethostname()
    problems = sorted(
        line.removeprefix(f"wrong: {host}: ") for line in output.splitlines() if line.startswith("wrong: ")
    )
    assert len(problems) == 4, output
    assert re.fullmatch(r"code is \w{12}, but \w{12} on most hosts", problems[0])
    assert problems[1].startswith("data /nowhere")
    assert problems[2] == "it has 0 GPUs, not 8"
    offset = re.fullmatch(rf"its clock is \+(\d\.\d+) s relative to that of {host}", problems[3])
    assert float(offset[1]) == pytest.approx(5, abs=1)
    assert not list((tmp_path / "runs").iterdir())


def test_arguments(tmp_path):
    for arguments, words in (
        (["recipe.yaml", "--megabytes", "0"], ("--megabytes is 0: it must be greater than 0",)),
        (["recipe.yaml"], ("recipe.yaml: No such file or directory",)),
        ([], ("see python -m pretrain.health --help",)),
    ):
        command = [sys.executable, "-m", "pretrain.health", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_S)
        check_line(result.returncode, result.stderr, words)


LIMITS = {
    "slow_below": 0.5,
    "max_clock_seconds": 1.0,
    "max_latency_ms": 50.0,
    "min_network_gb_per_second": 0.0,
    "min_disk_gb_per_second": 0.0,
    "min_free_disk_gb": 1.0,
    "min_free_memory_gb": 1.0,
    "min_free_gpu_memory_gb": 1.0,
}


@pytest.mark.parametrize(
    ("values", "limits", "problem"),
    [
        ({}, {}, None),
        ({"network_speed": 4e9}, {}, "slow, 4.000 GB/s between processes by rank 5; median 10.000 GB/s"),
        ({"network_speed": 6e9}, {}, None),
        ({"network_speed": 6e9}, {"slow_below": 0.7}, "slow, 6.000 GB/s between processes by rank 5; median 10.000"),
        ({"network_speed": 6e9}, {"min_network_gb_per_second": 7}, "6.000 GB/s between processes, less than 7"),
        ({"disk_speed": 1e8}, {}, "slow, 0.100 GB/s written to disk by rank 5; median 1.000 GB/s"),
        ({"free_disk": 5e8}, {}, "0.500 GB free on the disk of the run folder, less than 1.0"),
        ({"free_memory": 5e8}, {}, "0.500 GB of memory free, less than 1.0"),
        ({"free_gpu_memory": 5e8}, {}, "0.500 GB of GPU memory free, less than 1.0"),
        ({"gpus": 7}, {}, "it has 7 GPUs, not 8"),
        ({"latency": 0.06}, {}, "60.00 ms for 8 bytes, more than 50.0"),
        ({"clock_offset": -1.5}, {}, "its clock is -1.500 s relative to that of host-0"),
        ({"versions": {"torch": "2.12.0"}}, {}, "torch is 2.12.0, but 2.13.0 on most hosts"),
        ({"versions": {}}, {}, "torch is missing, but 2.13.0 on most hosts"),
        ({"problems": ["data is missing"]}, {}, "data is missing"),
    ],
)
def test_the_faulty_host_is_named(values, limits, problem):
    """With two processes on each of four hosts, the check names the host of the one that differs."""
    normal = {"gpus": 8, "free_memory": 1e12, "free_gpu_memory": 8e10, "free_disk": 1e13, "disk_speed": 1e9}
    normal |= {"network_speed": 1e10, "latency": 1e-4, "versions": {"torch": "2.13.0"}}
    reports = [
        Health(rank=rank, host=f"host-{rank // 2}", local_rank=rank % 2, **(normal | (values if rank == 5 else {})))
        for rank in range(8)
    ]
    problems = find_problems(reports, argparse.Namespace(**(LIMITS | limits)))
    assert len(problems) == (problem is not None)
    assert problem is None or problems[0].startswith(f"host-2: {problem}")


def check_shared_error(folder, shared):
    """Return the error of `check_shared` on this rank, or "". Each rank has its own folder unless `shared`."""
    import torch.distributed as dist

    from moonlight.train.shared_folder import check_shared

    path = folder / ("all" if shared else str(dist.get_rank()))
    path.mkdir(exist_ok=True)
    try:
        check_shared(path, seconds=0.5)
    except UserError as error:
        return str(error)
    return ""


def test_a_run_folder_that_hosts_do_not_share_is_refused(pool, tmp_path):
    assert pool.run(2, check_shared_error, tmp_path, True) == ["", ""]
    for error in pool.run(2, check_shared_error, tmp_path, False):
        assert "is not the same on all hosts" in error and "set runs_folder to a folder on a file system" in error
    assert not list(tmp_path.glob("*/.shared-*"))


# Hosts as network namespaces


@pytest.fixture
def hosts():
    hosts = Hosts("host-a", "host-b", "host-c")
    yield hosts
    hosts.close()


def check_on(hosts, command, folder, port):
    """Return the exit codes and the outputs of the check on all hosts."""
    processes = []
    for rank, name in enumerate(hosts.names):
        variables = environment(rank, len(hosts.names), "host-a", port) | {"GLOO_SOCKET_IFNAME": "eth0"}
        processes.append(hosts.start(name, command, folder / f"{name}.log", env=variables, cwd=ROOT))
    codes = [process.wait(timeout=PATIENCE_S) for process in processes]
    return codes, [(folder / f"{name}.log").read_text() for name in hosts.names]


@pytest.mark.faults
def test_a_slow_host_is_named(hosts, tiny_run, tmp_path):
    hosts.limit("host-c", megabits=200)
    command = check(
        tiny_run, tmp_path / "runs", "--slow-below", "0.3", "--megabytes", "16", "train.global_batch_size=6"
    )
    codes, outputs = check_on(hosts, command, tmp_path, 29530)
    assert codes == [1, 1, 1], outputs
    problems = [line for line in outputs[0].splitlines() if line.startswith("wrong: ")]
    assert len(problems) == 1 and problems[0].startswith("wrong: host-c: slow, 0.0"), outputs[0]


@pytest.mark.faults
def test_a_full_disk_is_reported(tiny_run, tmp_path):
    (tmp_path / "runs").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(tmp_path / "runs")]
    subprocess.run(mount, check=True)
    try:
        result = subprocess.run(
            [str(part) for part in check(tiny_run, tmp_path / "runs", "--min-free-disk-gb", "0")],
            env=environment(0, 1, "localhost", free_port()),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert not list((tmp_path / "runs").iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path / "runs")], check=True)
    assert result.returncode == 1, result
    words = f"{tmp_path / 'runs'} cannot be written: No space left on device, 0.001 GB free"
    assert [line for line in result.stdout.splitlines() if line.startswith("wrong: ")] == [
        f"wrong: {socket.gethostname()}: {words}"
    ]


@pytest.mark.faults
def test_a_disconnected_host_ends_the_check_on_all_hosts(hosts, tiny_run, tmp_path):
    """All hosts exit if one loses its link during the exchanges, which take minutes over a slow link."""
    hosts.limit("host-c", megabits=1)
    command = check(tiny_run, tmp_path / "runs", "--timeout-seconds", "20")

    def disconnect():
        deadline = time.monotonic() + PATIENCE_S
        file = f"/sys/class/net/{hosts.names[2]}/statistics/rx_bytes"
        read = ["ip", "netns", "exec", hosts.switch, "cat", file]
        # After a tenth of the exchange's bytes, the process groups exist and the slow exchange is in flight.
        while int(subprocess.run(read, capture_output=True, text=True).stdout) < 150_000:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        hosts.cut("host-c")

    thread = threading.Thread(target=disconnect)
    thread.start()
    codes, outputs = check_on(hosts, command, tmp_path, 29540)
    thread.join()
    assert codes == [2, 2, 2], outputs
    for name, text in zip(hosts.names, outputs, strict=True):
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and f"{name}: rank" in lines[0], text
        assert "lost its connection to the others" in lines[0], text
