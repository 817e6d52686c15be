"""RMS of the weights that a run ended with, by kind of matrix, as the paper's tables have it."""

from collections.abc import Mapping
from pathlib import Path

from moonlight.studies.ablation import Ablation, Trial
from moonlight.studies.measured import Measured, matrices_of, measure
from moonlight.studies.results import Result

WEIGHTS_FILE = "weight_rms.json"
KINDS = ("attention query", "attention key-value", "attention output", "MLP", "router")
"""MLP: dense ones, shared and routed experts."""


def kind_of(name: str) -> str:
    """Which of KINDS a matrix is, by its Hugging Face name."""
    where, what = name.split(".")[-3:-1]
    if where == "self_attn":
        return "attention " + {"q": "query", "k": "key-value", "o": "output"}[what[0]]
    return "router" if (where, what) == ("mlp", "gate") else "MLP"


def weight_rms_of(run_folder: Path) -> dict[str, float]:
    """RMS over all elements of each kind, from the run's newest checkpoint."""
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, matrix in matrices_of(run_folder):
        kind = kind_of(name)
        squares[kind] = squares.get(kind, 0.0) + matrix.double().square().sum().item()
        counts[kind] = counts.get(kind, 0) + matrix.numel()
    return {kind: (squares[kind] / counts[kind]) ** 0.5 for kind in KINDS if kind in counts}


def look(ablation: Ablation, results: Mapping[Trial, Result[Trial]]) -> Measured:
    """Of the runs that have not diverged."""
    ended = [trial for trial, result in results.items() if not result.diverged]
    return measure(ablation, ended, WEIGHTS_FILE, weight_rms_of)
