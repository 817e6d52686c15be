"""The benchmark's own arithmetic and its refusals; its figures are measured by `moonlight bench optimizer`."""

import importlib.metadata

import pytest

from moonlight.bench import loader, optimizer
from moonlight.bench.report import speed
from moonlight.errors import UserError


def test_peers_configured_alike_move_the_weights_alike():
    for figure in optimizer._steps(2, "cpu", True, stacks=3, count=4, rows=40, columns=24):
        assert figure.weights_apart is not None and 0 < figure.weights_apart <= optimizer.WEIGHT_TOLERANCE


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
