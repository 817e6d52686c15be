"""Launch scripts and image: linters, consistency of names, and the scripts run as two nodes of one process."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from moonlight.config.load import load_recipe
from moonlight.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "pretrain/launch"
PATIENCE_S = 400


def lint(tool, *files):
    """Run a linter of this environment. Return its exit code and stdout."""
    program = Path(sys.executable).parent / tool
    result = subprocess.run([program, *files], capture_output=True, text=True, timeout=60)
    return result.returncode, result.stdout


def test_scripts_pass_shellcheck(tmp_path):
    assert lint("shellcheck", *LAUNCH.glob("*.sh"), ROOT / "tests/slurm/scontrol") == (0, "")
    (tmp_path / "bad.sh").write_text("#!/bin/bash\nrm -r $1/x\n")
    assert lint("shellcheck", tmp_path / "bad.sh")[0] == 1


def test_image_passes_hadolint(tmp_path):
    assert lint("hadolint", ROOT / "Dockerfile") == (0, "")
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /tmp\n")
    assert lint("hadolint", tmp_path / "Dockerfile")[0] == 1


def test_image_names_existing_files():
    text = (ROOT / "Dockerfile").read_text()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    locks = [*re.findall(r"^ARG LOCK=(\w+)", text, re.M), *re.findall(r"--build-arg LOCK=(\w+)", text)]
    assert locks == ["cuda", "cpu"]
    assert all((ROOT / f"requirements/{lock}.txt").is_file() for lock in locks)
    assert "COPY requirements/${LOCK}.txt requirements/" in text and "-r requirements/${LOCK}.txt" in text
    for needed in ("README.md", "pyproject.toml", "moonlight", "pretrain", "checkpoints", "eval", "configs"):
        assert (ROOT / needed).exists() and needed not in ignored
    for secret in (".*", "runs", "data"):
        assert secret in ignored
    # `pip install --no-build-isolation` builds with the installed setuptools.
    assert all("\nsetuptools==" in (ROOT / f"requirements/{lock}.txt").read_text() for lock in locks)
    assert re.search(r"^USER 1000$", text, re.M) and "useradd --uid 1000" in text
    assert re.findall(r"^CMD (.*)", text, re.M) == ['["moonlight", "--help"]']


# Settings of the scripts


def script_settings():
    """Return the settings of torchrun.sh with their default values."""
    return dict(re.findall(r"^(\w+)=\$\{\1:-(.*?)\}", (LAUNCH / "torchrun.sh").read_text(), re.M))


def job_set():
    document = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    job = document["spec"]["replicatedJobs"][0]
    return document, job, job["template"]["spec"], job["template"]["spec"]["template"]["spec"]


def test_kubernetes_matches_the_script_the_image_and_the_recipe():
    document, job, spec, pod = job_set()
    container = pod["containers"][0]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment.keys() <= script_settings().keys()
    assert spec["completions"] == spec["parallelism"] == int(environment["NODES"])
    host = f"{document['metadata']['name']}-{job['name']}-0-0.{document['spec']['network']['subdomain']}"
    assert environment["HEAD"].split(":")[0] == host
    assert spec["completionMode"] == "Indexed" and spec["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] > int(script_settings()["SHUTDOWN_SECONDS"])

    image = (ROOT / "Dockerfile").read_text()
    folder = re.search(r"^WORKDIR (\S+)", image, re.M)[1]
    assert f"docker build -t {container['image']} ." in image
    assert f"USER {pod['securityContext']['runAsUser']}" in image and pod["securityContext"]["runAsNonRoot"]
    config = load_recipe(ROOT / container["args"][0], container["args"][1:])
    mounts = [Path(mount["mountPath"]) for mount in container["volumeMounts"]]
    paths = [config.runs_folder, config.data.tokenizer, *(source.path for source in config.data.mixture.values())]
    paths.append(environment.get("LOG_FOLDER", script_settings()["LOG_FOLDER"]))
    for path in paths:
        assert any((Path(folder) / path).is_relative_to(mount) for mount in mounts), path
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_slurm_signals_before_the_time_limit_and_allows_requeuing():
    text = (LAUNCH / "slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.M))
    assert options["ntasks-per-node"] == "1" and "requeue" in options
    signal_name, seconds = re.fullmatch(r"B:(\w+)@(\d+)", options["signal"]).groups()
    assert f"' {signal_name}\n" in text and int(seconds) > int(script_settings()["SHUTDOWN_SECONDS"])


# Runs of the scripts


@pytest.fixture
def environment(tmp_path):
    """Environment of two nodes with one process each on this machine."""
    return os.environ | {
        "NODES": "2",
        "PROCESSES_PER_NODE": "1",
        "HEAD": f"localhost:{free_ports()}",
        "HEALTH": "no",
        "LOG_FOLDER": str(tmp_path / "logs"),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def free_ports():
    """Return the first of two consecutive free ports."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def start(command, environment):
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([str(part) for part in command], env=environment, start_new_session=True, **options)


def finish(processes):
    """Return the output and exit code of each process, and kill any process group that is still running."""
    try:
        return [(process.communicate(timeout=PATIENCE_S)[0], process.returncode) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_torchrun_on_two_nodes(environment, tiny_run, tmp_path):
    """The same command on both nodes runs the health check and then trains."""
    environment |= {"HEALTH": "yes", "HEALTH_OPTIONS": "--megabytes 1 --disk-megabytes 1 --slow-below 0.001"}
    command = (LAUNCH / "torchrun.sh", tiny_run.recipe, f"runs_folder={tmp_path / 'runs'}")
    outcomes = finish([start(command, environment) for _ in range(2)])
    assert [code for _, code in outcomes] == [0, 0], outcomes
    assert sum("2 processes: nothing wrong" in output for output, _ in outcomes) == 1
    assert len(read_metrics(tmp_path / "runs/tiny")) == 4
    # The output of each process is logged by restart and rank.
    assert any("bits per byte: model" in path.read_text() for path in tmp_path.glob("logs/*/attempt_0/0/stdout.log"))


def test_training_does_not_start_if_the_health_check_fails(environment, tiny_run, tmp_path):
    environment |= {"NODES": "1", "HEALTH": "yes"}
    environment |= {"HEALTH_OPTIONS": "--megabytes 1 --disk-megabytes 1 --min-free-disk-gb 1e9"}
    command = (LAUNCH / "torchrun.sh", tiny_run.recipe, f"runs_folder={tmp_path / 'runs'}")
    ((output, code),) = finish([start(command, environment)])
    assert code == 1 and "GB free on the disk of the run folder, less than 1000000000.0" in output
    assert output.endswith(" training does not start; set HEALTH=no to skip the check\n") and "Traceback" not in output
    assert not list(tmp_path.glob("runs/*"))


def test_bad_arguments_of_scripts_are_one_line(environment):
    script = str(LAUNCH / "torchrun.sh")
    agent = [sys.executable, "-m", "pretrain.agent"]
    for command, words in (
        ([script], "usage: NODES=4 HEAD=node1:29500"),
        ([script, "recipe.yaml"], "HEAD is node1: give a host and a port"),
        ([*agent, "--nnodes", "1"], "error: SECONDS, the idle time after which the agent exits, must be above 0"),
        ([*agent, "-5"], "must be above 0: python -m pretrain.agent SECONDS"),
    ):
        ((output, code),) = finish([start(command, environment | {"HEAD": "node1"})])
        assert code == 2 and words in output and output.count("\n") == 1, output


def test_the_command_of_kubernetes(environment, tiny_run, tmp_path):
    """The container's command trains with this machine's host names and a tiny recipe."""
    container = job_set()[3]["containers"][0]
    for entry in container["env"]:
        environment.setdefault(entry["name"], entry["value"])
    overrides = [f"runs_folder={tmp_path / 'runs'}"]
    command = [*container["command"], tiny_run.recipe, *container["args"][1:], *overrides]
    outcomes = finish([start(command, environment) for _ in range(2)])
    assert [code for _, code in outcomes] == [0, 0], outcomes
    assert len(read_metrics(tmp_path / "runs/tiny")) == 4


@pytest.mark.slow
def test_slurm_job_signaled_before_its_time_limit_resumes_after_the_requeue(environment, tiny_run, tmp_path):
    environment |= {
        "PATH": f"{ROOT / 'tests/slurm'}:{environment['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "localhost,other",
        "PORT": environment.pop("HEAD").split(":")[1],
        "REQUEUED": str(tmp_path / "requeued"),
    }
    # sbatch runs a copy of the script in another folder.
    script = tmp_path / "slurm_script"
    script.write_bytes((LAUNCH / "slurm.sh").read_bytes())
    overrides = [f"runs_folder={tmp_path / 'runs'}", "train.train_steps=100", "train.save_every_steps=10"]
    command = ("bash", script, tiny_run.recipe, *overrides)
    job = start(command, environment)
    deadline = time.monotonic() + PATIENCE_S
    while len(read_metrics(tmp_path / "runs/tiny")) < 12:  # a checkpoint exists after step 10
        assert job.poll() is None and time.monotonic() < deadline, job.communicate(timeout=5)
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    ((output, code),) = finish([job])
    assert code == 0 and "requeuing the job" in output, output
    assert (tmp_path / "requeued").read_text() == "17\n"
    steps = len(read_metrics(tmp_path / "runs/tiny"))
    assert 12 <= steps < 100 and f"saved and stopped after step {steps} (SIGTERM)" in output

    ((output, code),) = finish([start(command, environment)])
    assert code == 0 and f"resuming after step {steps} of 100" in output, output
    assert len(read_metrics(tmp_path / "runs/tiny")) == 100
    assert (tmp_path / "requeued").read_text() == "17\n"


def test_slurm_job_that_fails_at_start_is_not_requeued(environment, tmp_path):
    environment |= {
        "PATH": f"{ROOT / 'tests/slurm'}:{environment['PATH']}",
        "SLURM_JOB_ID": "18",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "REQUEUED": str(tmp_path / "requeued"),
        "MAX_RESTARTS": "0",
    }
    ((output, code),) = finish([start((LAUNCH / "slurm.sh", tmp_path / "none.yaml"), environment)])
    assert code == 1 and "none.yaml: No such file or directory" in output, output
    assert not (tmp_path / "requeued").exists()
