"""RMS of a run's final weights by kind of matrix, as in the paper's tables."""

from collections.abc import Mapping
from pathlib import Path

from moonlight.studies.ablation import Ablation, AblationRun
from moonlight.studies.measured import Measured, iter_matrices, measure
from moonlight.studies.results import StudyResult

WEIGHTS_FILE = "weight_rms.json"
KINDS = ("attention query", "attention key-value", "attention output", "MLP", "router")
"""MLP covers dense layers, shared experts and routed experts."""


def matrix_kind(name: str) -> str:
    """Return the entry of KINDS for a matrix with this Hugging Face name."""
    block, module = name.split(".")[-3:-1]
    if block == "self_attn":
        return "attention " + {"q": "query", "k": "key-value", "o": "output"}[module[0]]
    return "router" if (block, module) == ("mlp", "gate") else "MLP"


def compute_weight_rms(run_folder: Path) -> dict[str, float]:
    """Return the RMS over all elements of each kind, from the run's newest checkpoint."""
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, matrix in iter_matrices(run_folder):
        kind = matrix_kind(name)
        squares[kind] = squares.get(kind, 0.0) + matrix.double().square().sum().item()
        counts[kind] = counts.get(kind, 0) + matrix.numel()
    return {kind: (squares[kind] / counts[kind]) ** 0.5 for kind in KINDS if kind in counts}


def measure_weight_rms(ablation: Ablation, results: Mapping[AblationRun, StudyResult[AblationRun]]) -> Measured:
    """Return the RMS by run and kind of matrix, for the runs that did not diverge."""
    finite = [trial for trial, result in results.items() if not result.diverged]
    return measure(ablation, finite, WEIGHTS_FILE, compute_weight_rms)
