"""Comparisons of gradients and of finished runs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints.reader import open_checkpoint
from moonlight.train.metrics import UNREPEATABLE, read_metrics
from tests.support.layouts import assemble


def relative(value: np.ndarray, reference: np.ndarray) -> float:
    """Return the relative Frobenius error."""
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def check_gradients(answers: list[dict], reference: dict) -> None:
    """Check the loss on every rank and each tensor's gradient against one process, to 1e-5."""
    for answer in answers:
        assert answer["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    gradients = assemble([answer["gradients"] for answer in answers])
    assert gradients.keys() == reference["gradients"].keys()
    errors = {key: relative(value, reference["gradients"][key]) for key, value in gradients.items()}
    assert not {key: error for key, error in errors.items() if not error <= 1e-5}


def outcome(config):
    """Return the step and every tensor of the last checkpoint, and the metrics that must repeat."""
    folder = Path(config.runs_folder) / config.name
    checkpoint = open_checkpoint(folder)
    tensors = {key: checkpoint.read(key) for key in checkpoint.stored.shapes}
    metrics = [
        {key: value for key, value in entry.items() if not key.startswith(UNREPEATABLE)}
        for entry in read_metrics(folder)
    ]
    return checkpoint.state.step, tensors, metrics


def check_same(config, other_config):
    """Check that two finished runs have bit-identical tensors and equal metrics."""
    (step, tensors, metrics), (other_step, other_tensors, other_metrics) = outcome(config), outcome(other_config)
    assert step == other_step == config.train.train_steps
    assert metrics == other_metrics
    assert [entry["step"] for entry in metrics] == list(range(1, step + 1))
    assert tensors.keys() == other_tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[key]), key
    assert any("momentum" in key for key in tensors)
