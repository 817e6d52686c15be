"""Comparisons of gradients and of finished runs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints.reader import open_checkpoint
from moonlight.train.metrics import UNREPEATABLE, read_metrics
from tests.support.layouts import assemble


def relative(value: np.ndarray, reference: np.ndarray) -> float:
    """Relative Frobenius error."""
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def check_gradients(answers: list[dict], reference: dict) -> None:
    """Loss on every rank and every tensor's gradient against one process, to 1e-5."""
    for answer in answers:
        assert answer["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    gradients = assemble([answer["gradients"] for answer in answers])
    assert gradients.keys() == reference["gradients"].keys()
    errors = {key: relative(value, reference["gradients"][key]) for key, value in gradients.items()}
    assert not {key: error for key, error in errors.items() if not error <= 1e-5}


def outcome(run):
    """Every tensor of the last checkpoint, and the metrics that must repeat."""
    folder = Path(run.runs_folder) / run.name
    checkpoint = open_checkpoint(folder)
    tensors = {key: checkpoint.read(key) for key in checkpoint.stored.shapes}
    metrics = [
        {key: value for key, value in entry.items() if not key.startswith(UNREPEATABLE)}
        for entry in read_metrics(folder)
    ]
    return checkpoint.state.step, tensors, metrics


def check_same(run, other):
    (step, tensors, metrics), (other_step, other_tensors, other_metrics) = outcome(run), outcome(other)
    assert step == other_step == run.train.train_steps
    assert metrics == other_metrics
    assert [entry["step"] for entry in metrics] == list(range(1, step + 1))
    assert tensors.keys() == other_tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[key]), key
    assert any("momentum" in key for key in tensors)
