"""Arithmetic, gates and errors of the benchmarks. `moonlight bench` measures the results themselves."""

import importlib.metadata
import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from matplotlib import image

from moonlight.bench import checkpoint, loader, monitors, optimizer, optimizer_gpu, picture, startup, tokenizer
from moonlight.bench.report import BenchResult, against_bar, hardware, print_results, time_ratio
from moonlight.config.schedule import ScheduleConfig
from moonlight.dist_checkpoint.async_save import AsyncCheckpointer
from moonlight.dist_checkpoint.state import TrainState, step_folder
from moonlight.errors import CODE_STOPPED, UserError
from moonlight.files import check_output_file
from tests.support.layouts import build, recipe


def test_peers_with_equal_settings_update_the_weights_equally():
    for result in optimizer._steps(2, "cpu", True, stacks=3, count=4, rows=40, columns=24):
        assert result.weights_apart is not None and 0 < result.weights_apart <= optimizer.WEIGHT_TOLERANCE


def test_gpu_benchmark_times_optimizers_that_update_the_weights_equally():
    results = optimizer_gpu.step_results(2, "cpu", True, stacks=3, count=4, rows=40, columns=24)
    assert [result.case.split(", ")[1] for result in results] == list(optimizer_gpu.STEP_BARS)
    cublas, *peers = (result.weights_apart for result in results)
    assert cublas == 0  # on a CPU both are the same code
    assert all(0 < difference <= optimizer.WEIGHT_TOLERANCE for difference in peers)


def test_symmetric_product_must_be_correct_for_its_rate_to_pass(monkeypatch):
    result, *_ = optimizer_gpu.product_results(1, "cpu", (1, 40, 24))[0]
    assert result.unit == "TFLOP/s" and not result.passed  # the Triton interpreter is far slower than a GPU
    monkeypatch.setattr(optimizer_gpu, "PRODUCT_BAR", 0)
    assert optimizer_gpu.product_results(1, "cpu", (1, 40, 24))[0][0].passed
    monkeypatch.setattr("moonlight.kernels.symmetric.symmetric_product", lambda x, y, out, **tiling: out.fill_(1))
    assert not optimizer_gpu.product_results(1, "cpu", (1, 40, 24))[0][0].passed


def test_a_failed_gate_fails_the_result():
    assert time_ratio("case", [1.0], [30.0], 10, True).passed
    assert not time_ratio("case", [1.0], [30.0], 10, False).passed
    assert not time_ratio("case", [1.0], [9.0], 10, True).passed


def test_a_results_file_holds_environment_and_rounds(tmp_path):
    path = tmp_path / "case.json"
    results = [
        time_ratio("case", [2.0, 1.0, 4.0], [6.0, 8.0, 4.0], 1.5, True, aim=4.0),
        BenchResult("", "", 1, 2, 2, "", "", True),
    ]
    assert print_results("title", results, hardware("cpu"), ["a note"], path)
    content = json.loads(path.read_text())
    assert content["versions"]["torch"] == torch.__version__ and "megatron-core" in content["versions"]
    assert content["threads"] == torch.get_num_threads() and content["command"].startswith("moonlight ")
    first = content["figures"][0]
    assert first["ours"] == {"median": 2.0, "minimum": 1.0, "maximum": 4.0, "rounds": [2.0, 1.0, 4.0]}
    assert first["ratio"] == {"median": 3.0, "minimum": 1.0, "maximum": 8.0, "rounds": [3.0, 8.0, 1.0]}
    assert (first["bar"], first["aim"], first["passed"]) == (">= 1.5", 4.0, True)
    assert content["figures"][1]["peer"]["rounds"] == [2]


def test_a_fixed_bar_instead_of_a_peer():
    result = against_bar("case", [4.0, 5.0, 9.0], 10.0, True, "s", 2.5)
    assert (result.ratio, result.passed, result.aim) == (2.0, True, 4.0)
    assert not against_bar("case", [11.0], 10.0, True, "s", 2.5).passed


def test_the_plot_uses_the_newest_files(tmp_path):
    def write_result(name, date, ours, unit="ms"):
        results = [time_ratio(f"case of {name}", [ours], [10.0], 2.0, True, unit)]
        print_results("title", results, hardware("cpu"), (), tmp_path / f"{name}-{date}.json")

    with pytest.raises(UserError, match=r"holds no <name>-<date>\.json"):
        picture.plot_results(tmp_path, tmp_path / "bench.png")
    write_result("loader", "2026-01-09", 1.0)
    write_result("train-step", "2026-01-08", 2.0)
    out = tmp_path / "images" / "bench.png"
    assert [path.name for path in picture.plot_results(tmp_path, out)] == [
        "loader-2026-01-09.json",
        "train-step-2026-01-08.json",
    ]
    before = image.imread(out)
    assert before.shape[1] == 1200
    write_result("loader", "2026-01-08", 3.0)  # older: nothing changes
    picture.plot_results(tmp_path, out)
    assert (image.imread(out) == before).all()
    write_result("loader", "2026-01-10", 8.0)
    picture.plot_results(tmp_path, out)
    after = image.imread(out)
    assert after.shape != before.shape or (after != before).any()
    (tmp_path / "odd-2026-01-10.json").write_text("[]")
    with pytest.raises(UserError, match=r"odd-2026-01-10\.json is not a results file"):
        picture.plot_results(tmp_path, out)


def test_chart_bars_hold_ratio_range_and_bar():
    content = {
        "figures": [
            time_ratio("faster", [1.0, 2.0, 4.0], [8.0, 8.0, 8.0], 3.0, True).as_json(),
            BenchResult("share", "ms", 1, 200, 0.5, "", "<= 1 %", True, ratio_rounds=(0.4, 0.5, 0.8)).as_json(),
            BenchResult("accuracy", "", 1.0, 1.0, 1.0, "", ">= 0.98", True).as_json(),
        ]
    }
    faster, share = picture.chart_bars("name", content)
    assert (faster.ratio, faster.low, faster.high, faster.bar) == (4.0, 2.0, 8.0, 3.0)
    assert (share.ratio, share.low, share.high, share.bar) == (200.0, 125.0, 250.0, 100.0)


@pytest.mark.slow
def test_startup_time_is_measured_on_a_real_run(tmp_path):
    data, tokenizer = startup.make_data(tmp_path, 4096)
    arguments = [f"runs_folder={tmp_path}", f"data.path={data}", f"data.tokenizer={tokenizer}", "train.stop_at_step=1"]
    seconds, loss = startup._first_step(tmp_path / "one", ["configs/quickstart.yaml", "name=one", *arguments])
    entries = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1] and entries[0]["loss/train"] == loss
    assert seconds > entries[0]["time/step_seconds"]
    with pytest.raises(RuntimeError, match=r"exit code 2.*schedule.lr"):
        startup._first_step(tmp_path / "two", ["configs/quickstart.yaml", "name=two", *arguments, "schedule.lr=fast"])


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        (
            "moonlight.cli.main, moonlight.train.run_folder, pretrain.local",
            "torch",
        ),  # the process that starts the ranks
        # A rank. With CUDA, Megatron compiles functions.
        ("moonlight.parallel, moonlight.train.loop", "datasets" if torch.cuda.is_available() else "torch._inductor"),
    ],
)
def test_a_run_imports_no_slow_unused_modules(modules, without):
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert without not in loaded and not {"transformers", "matplotlib.pyplot"} & {*loaded}


def test_both_loaders_read_the_same_documents(tmp_path):
    folder = tmp_path / "web"
    loader._make_source(folder, 40 * loader.LENGTH, 0)
    assert loader._is_correct(folder)
    peer, samples = loader._open_peer(folder), loader._open(folder)
    assert [tensor.shape for tensor in loader._read_peer(peer, 0, 1)] == [(loader.BATCH, loader.LENGTH)] * 3
    # One epoch of either loader holds the same tokens in a different order, except for the last window.
    our_sum = sum(int(samples[index][0][1:].sum()) for index in range(samples.samples_per_epoch))
    peer_sum = sum(int(peer[index]["labels"].sum()) for index in range(len(peer)))
    assert our_sum == pytest.approx(peer_sum, rel=0.05)


def test_all_tokenizers_give_the_same_ids(tokenizer_folder):
    batches = tokenizer._batches(300_000)
    assert sum(len(text) for batch in batches for text in batch.raw) >= 300_000
    cases = tokenizer._cases(tokenizer_folder, batches, 2)
    expected = [list(ids) for ids in cases["ours, one core"]()]
    assert len(expected) == sum(len(batch.raw) for batch in batches) and all(expected)
    for name, call in cases.items():
        assert [list(ids) for ids in call()] == expected, name


def checkpoint_gate_results(folder):
    """Return the gate's result for a checkpoint, before and after one bit of the momentum changes."""
    config = recipe()
    _, optimizer = build(config)
    saver = AsyncCheckpointer(folder, config, optimizer, tokenizer_sha256="")
    saver.save(TrainState(step=1))
    saver.finalize()
    before = checkpoint._is_equal(step_folder(folder, 1), optimizer)
    optimizer.owned[0].states[0].view(-1)[-1] = 1e-45
    return [before, checkpoint._is_equal(step_folder(folder, 1), optimizer)]


def test_a_save_that_differs_by_one_bit_fails_the_gate(pool, tmp_path):
    assert pool.run(1, checkpoint_gate_results, tmp_path) == [[True, False]]


def measure_monitors(learning_rate):
    config = recipe()
    return monitors._measure(replace(config, schedule=ScheduleConfig(lr=learning_rate, router_bias_update_rate=0.0)), 2)


def test_monitors_that_change_a_step_fail_the_gate(pool):
    ((times, passed),) = pool.run(1, measure_monitors, 1e-30)
    assert passed and all(len(times[part]) == 2 and min(times[part]) > 0 for part in monitors.PARTS)
    ((_, passed),) = pool.run(1, measure_monitors, 1e-2)  # at this rate the losses differ between steps
    assert not passed


def test_monitor_cost_follows_from_the_monitor_intervals():
    names = ("step", "metrics", "all metrics", "logits", "monitors", "entropies")
    times = dict(zip(names, (1.0, 1e-3, 3e-3, 1e-2, 2e-2, 0.12), strict=True))
    result = monitors._result("case", {part: [seconds] for part, seconds in times.items()}, True)
    assert result.ours == pytest.approx(1.0 + 3.2 + 1.0) and result.ratio == pytest.approx(0.52) and result.passed
    assert not monitors._result("case", {part: [1.0] for part in times}, True).passed


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("loader --rounds 0", "'--rounds': Input should be greater than or equal to 1"),
        ("profile configs/quickstart.yaml --threads 0", "'--threads': Input should be greater than or equal to 1"),
        ("export --layers 1", "'--layers': Input should be greater than or equal to 2"),
        ("startup --json docs", "--json is docs, a folder: give the name of a file, such as docs/figures.json"),
        ("train-step --json README.md/x.json", "README.md is a file; give a path in a folder"),
        ("optimizer --device tpu", "--device is tpu: it must be cpu or cuda"),
    ],
)
def test_bad_arguments_are_rejected_before_any_measurement(command, message):
    process = subprocess.run(
        [sys.executable, "-m", "moonlight.cli", "bench", *command.split()], capture_output=True, text=True, timeout=100
    )
    assert process.returncode == 2 and message in process.stderr and process.stderr.count("\n") == 1


def test_results_are_written_to_a_new_folder(tmp_path):
    path = tmp_path / "new" / "figures.json"
    check_output_file("--json", path, "figures.json")
    print_results("title", [against_bar("case", [1.0], 2.0, True, "s", 1.0)], hardware("cpu"), (), path)
    assert json.loads(path.read_text())["figures"][0]["own_limit"]


def test_a_terminated_benchmark_leaves_no_files(tmp_path):
    command = [sys.executable, "-m", "moonlight.cli", "bench", "loader", "--rounds", "1000", "--tokens", "5000000"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "round 1 of 1000" not in (line := process.stderr.readline()):
            assert line, "the benchmark exited before the signal"
        assert list(tmp_path.glob(".bench-*"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == CODE_STOPPED
    assert not list(tmp_path.iterdir())


def test_error_of_a_missing_peer_names_the_install_command(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UserError, match=r"muon-optimizer==0\.1\.0 is missing: python -m pip install"):
        optimizer.bench_optimizer(1, "cpu")
