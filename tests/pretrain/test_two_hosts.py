"""Training on two hosts in their own network: killed processes, a killed host, a cut link."""

import os
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from moonlight.config.load import to_yaml
from moonlight.train.metrics import read_metrics
from tests.support.comparisons import check_same
from tests.support.faults import ROOT
from tests.support.hosts import Hosts
from tests.support.layouts import make_run

pytestmark = pytest.mark.faults
NAMES = ("host-a", "host-b")
HANG_SECONDS, JOIN_SECONDS = 20, 30
PATIENCE_S = 600


@pytest.fixture(scope="module")
def hosts():
    hosts = Hosts(*NAMES)
    yield hosts
    hosts.close()


class Job:
    """One recipe started by torchrun.sh on both hosts."""

    def __init__(self, hosts, folder, config, port, **settings):
        self.hosts, self.folder, self.config = hosts, folder, config
        self.recipe = folder / f"{config.name}.yaml"
        self.recipe.write_text(to_yaml(config))
        self.environment = os.environ | {
            "NODES": "2",
            "PROCESSES_PER_NODE": "1",
            "HEAD": f"host-a:{port}",
            "RUN_ID": config.name,
            "INTERFACE": "eth0",
            "JOIN_SECONDS": str(JOIN_SECONDS * 4),
            "SHUTDOWN_SECONDS": "20",
            "HEALTH": "no",
            "LOG_FOLDER": str(folder / "logs"),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            **settings,
        }
        self.agents = {}

    def start(self, *names):
        for name in names:
            command = (ROOT / "pretrain/launch/torchrun.sh", self.recipe)
            self.agents[name] = self.hosts.start(name, command, self.log(name), env=self.environment, cwd=ROOT)

    def log(self, name):
        return self.folder / f"{self.config.name}-{name}.log"

    def logs(self):
        """Return the logs of both hosts."""
        return "\n".join(f"--- {name}\n{self.log(name).read_text()}" for name in NAMES)

    def wait_for_step(self, step):
        deadline = time.monotonic() + PATIENCE_S
        while len(read_metrics(Path(self.config.runs_folder) / self.config.name)) < step:
            assert time.monotonic() < deadline and all(a.poll() is None for a in self.agents.values()), self.logs()
            time.sleep(0.02)

    def wait(self):
        """Wait for both agents and return their exit codes."""
        return [self.agents[name].wait(timeout=PATIENCE_S) for name in NAMES]


@pytest.fixture(scope="module")
def make_job(hosts, data_folder, tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")

    def make(name, port, **settings):
        steps = {"train_steps": 60, "save_every_steps": 10, "validate_every_steps": 30}
        config = make_run(folder / "runs", data_folder, tokenizer_folder, "EP2", **steps)
        train_config = replace(config.train, threads_per_process=1, hang_timeout_seconds=HANG_SECONDS)
        return Job(hosts, folder, replace(config, name=name, train=train_config), port, **settings)

    return make


@pytest.fixture(scope="module")
def uninterrupted(make_job):
    """A job that runs without faults, after a health check."""
    job = make_job("uninterrupted", 29500, HEALTH="yes", HEALTH_OPTIONS="--slow-below 0.01 --max-latency-ms 5000")
    job.start(*NAMES)
    assert job.wait() == [0, 0], job.logs()
    assert "2 host(s), 2 processes: nothing wrong" in job.log("host-a").read_text()
    return job


def training_processes(hosts, name):
    return [process for process in hosts.processes_of(name) if "RANK" in process.environ()]


def test_training_survives_killed_processes_and_a_killed_host(hosts, uninterrupted, make_job):
    """Agents restart killed processes, and a restarted host joins the waiting agent. The result is bit-identical."""
    job = make_job("killed", 29510)
    job.start(*NAMES)
    job.wait_for_step(15)
    killed = training_processes(hosts, "host-b")
    assert killed
    for process in killed:
        process.kill()
    job.wait_for_step(35)
    for process in hosts.processes_of("host-b"):
        process.kill()
    assert job.agents["host-b"].wait(timeout=30) == -signal.SIGKILL
    job.start("host-b")
    assert job.wait() == [0, 0], job.logs()
    assert job.logs().count("resuming after step") == 2, job.logs()
    check_same(uninterrupted.config, job.config)


def test_both_hosts_exit_after_a_link_cut_and_a_rerun_resumes(hosts, uninterrupted, make_job):
    job = make_job("cut", 29520, JOIN_SECONDS=str(JOIN_SECONDS), MAX_RESTARTS="1")
    job.start(*NAMES)
    job.wait_for_step(15)
    hosts.cut("host-b")
    cut_at = time.monotonic()
    try:
        codes = job.wait()
        seconds = time.monotonic() - cut_at
    finally:
        hosts.mend("host-b")
    assert all(code not in (0, None) for code in codes), job.logs()
    for name in NAMES:
        log = job.log(name).read_text()
        assert re.search(r"[Tt]imed out|[Tt]imeout", log), log
    print(f"\nboth sides ended {seconds:.0f} s after the cut with codes {codes}")
    # The hanging exchange, the agents' rendezvous, and slack for a loaded machine.
    assert seconds < HANG_SECONDS + JOIN_SECONDS + 90 + 60, job.logs()
    assert not any(psutil.pid_exists(process.pid) for name in NAMES for process in training_processes(hosts, name))
    job.agents.clear()
    job.start(*NAMES)
    assert job.wait() == [0, 0], job.logs()
    assert "resuming after step" in job.logs()
    check_same(uninterrupted.config, job.config)
