"""The benchmarks' own arithmetic, gates and refusals; their figures are measured by `moonlight bench`."""

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


def test_peers_configured_alike_move_the_weights_alike():
    for figure in optimizer._steps(2, "cpu", True, stacks=3, count=4, rows=40, columns=24):
        assert figure.weights_apart is not None and 0 < figure.weights_apart <= optimizer.WEIGHT_TOLERANCE


def test_a_gpu_would_time_optimizers_that_move_the_weights_alike():
    figures = optimizer_gpu.step_results(2, "cpu", True, stacks=3, count=4, rows=40, columns=24)
    assert [figure.case.split(", ")[1] for figure in figures] == list(optimizer_gpu.STEP_BARS)
    cublas, *peers = (figure.weights_apart for figure in figures)
    assert cublas == 0  # on a CPU both are one thing
    assert all(0 < apart <= optimizer.WEIGHT_TOLERANCE for apart in peers)


def test_the_symmetric_product_is_compared_before_its_rate_counts(monkeypatch):
    figure, *_ = optimizer_gpu.product_results(1, "cpu", (1, 40, 24))[0]
    assert figure.unit == "TFLOP/s" and not figure.passed  # an interpreter is no GPU
    monkeypatch.setattr(optimizer_gpu, "PRODUCT_BAR", 0)
    assert optimizer_gpu.product_results(1, "cpu", (1, 40, 24))[0][0].passed
    monkeypatch.setattr("moonlight.kernels.symmetric.symmetric_product", lambda x, y, out, **tiling: out.fill_(1))
    assert not optimizer_gpu.product_results(1, "cpu", (1, 40, 24))[0][0].passed


def test_a_failed_gate_fails_the_figure():
    assert time_ratio("case", [1.0], [30.0], 10, True).passed
    assert not time_ratio("case", [1.0], [30.0], 10, False).passed
    assert not time_ratio("case", [1.0], [9.0], 10, True).passed


def test_what_is_kept_of_a_benchmark(tmp_path):
    path = tmp_path / "case.json"
    figures = [
        time_ratio("case", [2.0, 1.0, 4.0], [6.0, 8.0, 4.0], 1.5, True, aim=4.0),
        BenchResult("", "", 1, 2, 2, "", "", True),
    ]
    assert print_results("title", figures, hardware("cpu"), ["a note"], path)
    content = json.loads(path.read_text())
    assert content["versions"]["torch"] == torch.__version__ and "megatron-core" in content["versions"]
    assert content["threads"] == torch.get_num_threads() and content["command"].startswith("moonlight ")
    kept = content["figures"][0]
    assert kept["ours"] == {"median": 2.0, "minimum": 1.0, "maximum": 4.0, "rounds": [2.0, 1.0, 4.0]}
    assert kept["ratio"] == {"median": 3.0, "minimum": 1.0, "maximum": 8.0, "rounds": [3.0, 8.0, 1.0]}
    assert (kept["bar"], kept["aim"], kept["passed"]) == (">= 1.5", 4.0, True)
    assert content["figures"][1]["peer"]["rounds"] == [2]


def test_a_bar_in_the_place_of_a_peer():
    figure = against_bar("case", [4.0, 5.0, 9.0], 10.0, True, "s", 2.5)
    assert (figure.ratio, figure.passed, figure.aim) == (2.0, True, 4.0)
    assert not against_bar("case", [11.0], 10.0, True, "s", 2.5).passed


def test_the_picture_is_made_of_the_newest_files(tmp_path):
    def keep(name, date, ours, unit="ms"):
        figures = [time_ratio(f"case of {name}", [ours], [10.0], 2.0, True, unit)]
        print_results("title", figures, hardware("cpu"), (), tmp_path / f"{name}-{date}.json")

    with pytest.raises(UserError, match=r"holds no <name>-<date>\.json"):
        picture.plot_results(tmp_path, tmp_path / "bench.png")
    keep("loader", "2026-01-09", 1.0)
    keep("train-step", "2026-01-08", 2.0)
    out = tmp_path / "images" / "bench.png"
    assert [path.name for path in picture.plot_results(tmp_path, out)] == [
        "loader-2026-01-09.json",
        "train-step-2026-01-08.json",
    ]
    before = image.imread(out)
    assert before.shape[1] == 1200
    keep("loader", "2026-01-08", 3.0)  # older: nothing changes
    picture.plot_results(tmp_path, out)
    assert (image.imread(out) == before).all()
    keep("loader", "2026-01-10", 8.0)
    picture.plot_results(tmp_path, out)
    after = image.imread(out)
    assert after.shape != before.shape or (after != before).any()
    (tmp_path / "odd-2026-01-10.json").write_text("[]")
    with pytest.raises(UserError, match=r"odd-2026-01-10\.json is not a results file"):
        picture.plot_results(tmp_path, out)


def test_what_the_picture_shows():
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
def test_the_start_of_a_run_is_measured_by_a_run(tmp_path):
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
        ),  # what starts the processes of a run
        # And one of them; with CUDA, Megatron compiles functions.
        ("moonlight.parallel, moonlight.train.loop", "datasets" if torch.cuda.is_available() else "torch._inductor"),
    ],
)
def test_a_run_imports_nothing_slow_that_it_does_not_need(modules, without):
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert without not in loaded and not {"transformers", "matplotlib.pyplot"} & {*loaded}


def test_both_loaders_read_the_same_documents(tmp_path):
    folder = tmp_path / "web"
    loader._make_source(folder, 40 * loader.LENGTH, 0)
    assert loader._is_correct(folder)
    peer, samples = loader._open_peer(folder), loader._open(folder)
    assert [tensor.shape for tensor in loader._read_peer(peer, 0, 1)] == [(loader.BATCH, loader.LENGTH)] * 3
    # An epoch of each, but for the last window, has the same tokens in another order.
    own = sum(int(samples[number][0][1:].sum()) for number in range(samples.samples_per_epoch))
    theirs = sum(int(peer[number]["labels"].sum()) for number in range(len(peer)))
    assert own == pytest.approx(theirs, rel=0.05)


def test_all_tokenizers_give_the_same_ids(tokenizer_folder):
    batches = tokenizer._batches(300_000)
    assert sum(len(text) for batch in batches for text in batch.raw) >= 300_000
    cases = tokenizer._cases(tokenizer_folder, batches, 2)
    expected = [list(ids) for ids in cases["ours, one core"]()]
    assert len(expected) == sum(len(batch.raw) for batch in batches) and all(expected)
    for name, call in cases.items():
        assert [list(ids) for ids in call()] == expected, name


def gate_of_saves(folder):
    """What the gate says of a checkpoint, and then beside a momentum that is one bit off."""
    run = recipe()
    _, optimizer = build(run)
    saver = AsyncCheckpointer(folder, run, optimizer, tokenizer_sha256="")
    saver.save(TrainState(step=1))
    saver.finalize()
    said = [checkpoint._is_equal(step_folder(folder, 1), optimizer)]
    optimizer.owned[0].states[0].view(-1)[-1] = 1e-45
    return [*said, checkpoint._is_equal(step_folder(folder, 1), optimizer)]


def test_a_save_of_other_bits_fails_the_gate(pool, tmp_path):
    assert pool.run(1, gate_of_saves, tmp_path) == [[True, False]]


def monitors_timed(learning_rate):
    run = recipe()
    return monitors._measure(replace(run, schedule=ScheduleConfig(lr=learning_rate, router_bias_update_rate=0.0)), 2)


def test_monitors_that_change_a_step_would_fail_the_gate(pool):
    ((times, passed),) = pool.run(1, monitors_timed, 1e-30)
    assert passed and all(len(times[part]) == 2 and min(times[part]) > 0 for part in monitors.PARTS)
    ((_, passed),) = pool.run(1, monitors_timed, 1e-2)  # now losses differ from step to step
    assert not passed


def test_the_cost_of_monitors_follows_from_their_cadence():
    names = ("step", "metrics", "all metrics", "logits", "monitors", "entropies")
    times = dict(zip(names, (1.0, 1e-3, 3e-3, 1e-2, 2e-2, 0.12), strict=True))
    figure = monitors._result("case", {part: [seconds] for part, seconds in times.items()}, True)
    assert figure.ours == pytest.approx(1.0 + 3.2 + 1.0) and figure.ratio == pytest.approx(0.52) and figure.passed
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
def test_bad_arguments_are_refused_before_anything_is_measured(command, message):
    ended = subprocess.run(
        [sys.executable, "-m", "moonlight.cli", "bench", *command.split()], capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 2 and message in ended.stderr and ended.stderr.count("\n") == 1


def test_figures_are_written_into_a_folder_that_is_made(tmp_path):
    path = tmp_path / "new" / "figures.json"
    check_output_file("--json", path, "figures.json")
    print_results("title", [against_bar("case", [1.0], 2.0, True, "s", 1.0)], hardware("cpu"), (), path)
    assert json.loads(path.read_text())["figures"][0]["own_limit"]


def test_an_ended_benchmark_leaves_no_files(tmp_path):
    command = [sys.executable, "-m", "moonlight.cli", "bench", "loader", "--rounds", "1000", "--tokens", "5000000"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "round 1 of 1000" not in (line := process.stderr.readline()):
            assert line, "it ended by itself"
        assert list(tmp_path.glob(".bench-*"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == CODE_STOPPED
    assert not list(tmp_path.iterdir())


def test_a_missing_peer_is_named_with_its_command(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UserError, match=r"muon-optimizer==0\.1\.0 is missing: python -m pip install"):
        optimizer.bench_optimizer(1, "cpu")
