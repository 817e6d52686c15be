"""The benchmarks' own arithmetic, gates and refusals; their figures are measured by `moonlight bench`."""

import importlib.metadata
from dataclasses import replace
from pathlib import Path

import pytest
from layouts import build, recipe

from moonlight.bench import checkpoint, loader, monitors, optimizer, optimizer_gpu
from moonlight.bench.report import speed
from moonlight.config import Schedule
from moonlight.errors import UserError
from moonlight.train.checkpoint_files import TrainState, step_folder
from moonlight.train.saver import Saver


def test_peers_configured_alike_move_the_weights_alike():
    for figure in optimizer._steps(2, "cpu", True, stacks=3, count=4, rows=40, columns=24):
        assert figure.weights_apart is not None and 0 < figure.weights_apart <= optimizer.WEIGHT_TOLERANCE


def test_a_gpu_would_time_optimizers_that_move_the_weights_alike():
    figures = optimizer_gpu.step_figures(2, "cpu", True, stacks=3, count=4, rows=40, columns=24)
    assert [figure.case.split(", ")[1] for figure in figures] == list(optimizer_gpu.STEP_BARS)
    cublas, *peers = (figure.weights_apart for figure in figures)
    assert cublas == 0  # on a CPU both are one thing
    assert all(0 < apart <= optimizer.WEIGHT_TOLERANCE for apart in peers)


def test_the_symmetric_product_is_compared_before_its_rate_counts(monkeypatch):
    figure, *_ = optimizer_gpu.product_figures(1, "cpu", (1, 40, 24))[0]
    assert figure.unit == "TFLOP/s" and not figure.passed  # an interpreter is no GPU
    monkeypatch.setattr(optimizer_gpu, "PRODUCT_BAR", 0)
    assert optimizer_gpu.product_figures(1, "cpu", (1, 40, 24))[0][0].passed
    monkeypatch.setattr("moonlight.kernels.symmetric.symmetric_product", lambda x, y, out, **tiling: out.fill_(1))
    assert not optimizer_gpu.product_figures(1, "cpu", (1, 40, 24))[0][0].passed


def test_a_failed_gate_fails_the_figure():
    assert speed("case", [1.0], [30.0], 10, True).passed
    assert not speed("case", [1.0], [30.0], 10, False).passed
    assert not speed("case", [1.0], [9.0], 10, True).passed


def test_both_loaders_read_the_same_documents(tmp_path):
    folder = tmp_path / "web"
    loader._make_source(folder, 40 * loader.LENGTH, 0)
    assert loader._is_right(folder)
    peer, samples = loader._open_peer(folder), loader._open(folder)
    assert [tensor.shape for tensor in loader._read_peer(peer, 0, 1)] == [(loader.BATCH, loader.LENGTH)] * 3
    # An epoch of each, but for the last window, has the same tokens in another order.
    own = sum(int(samples[number][0][1:].sum()) for number in range(samples.samples_per_epoch))
    theirs = sum(int(peer[number]["labels"].sum()) for number in range(len(peer)))
    assert own == pytest.approx(theirs, rel=0.05)


def gate_of_saves(folder):
    """What the gate says of a checkpoint, and then beside a momentum that is one bit off."""
    run = recipe()
    _, optimizer = build(run)
    saver = Saver(folder, run, optimizer, tokenizer_sha256="")
    saver.save(TrainState(step=1))
    saver.finish()
    said = [checkpoint._is_equal(step_folder(folder, 1), optimizer)]
    optimizer.owned[0].momenta[0].view(-1)[-1] = 1e-45
    return [*said, checkpoint._is_equal(step_folder(folder, 1), optimizer)]


def test_a_save_of_other_bits_fails_the_gate(pool, tmp_path):
    assert pool.run(1, gate_of_saves, tmp_path) == [[True, False]]


def monitors_timed(learning_rate):
    run = recipe()
    return monitors._measure(replace(run, schedule=Schedule(lr=learning_rate, router_bias_update_rate=0.0)), 2)


def test_monitors_that_change_a_step_would_fail_the_gate(pool):
    ((times, passed),) = pool.run(1, monitors_timed, 1e-30)
    assert passed and all(len(times[part]) == 2 and min(times[part]) > 0 for part in monitors.PARTS)
    ((_, passed),) = pool.run(1, monitors_timed, 1e-2)  # now losses differ from step to step
    assert not passed


def test_the_cost_of_monitors_follows_from_their_cadence():
    times = {"step": 1.0, "told": 1e-3, "told watched": 3e-3, "logits": 1e-2, "watched": 2e-2, "entropies": 0.12}
    figure = monitors._figure("case", {part: [seconds] for part, seconds in times.items()}, True)
    assert figure.ours == pytest.approx(1.0 + 3.2 + 1.0) and figure.ratio == pytest.approx(0.52) and figure.passed
    assert not monitors._figure("case", {part: [1.0] for part in times}, True).passed


def test_bad_arguments_of_the_checkpoint_benchmark():
    with pytest.raises(UserError, match="--layers 1: at least 1 and 2 are accepted"):
        checkpoint.bench_checkpoint(1, 1, Path("configs/moonlight_family/a0.1b.yaml"))


@pytest.mark.parametrize(("rounds", "device", "message"), [(0, "cpu", "--rounds is 0"), (1, "tpu", "--device is tpu")])
def test_bad_arguments_are_named(rounds, device, message):
    with pytest.raises(UserError, match=message):
        optimizer.bench_optimizer(rounds, device)


def test_a_missing_peer_is_named_with_its_command(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UserError, match=r"muon-optimizer==0\.1\.0 is missing: python -m pip install"):
        optimizer.bench_optimizer(1, "cpu")
