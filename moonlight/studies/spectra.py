"""SVD entropy of every matrix of the best runs of a ladder, to test if Muon uses more directions than AdamW.

Training monitors means over groups. This module reads every matrix of each run's last checkpoint.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from moonlight.dist_checkpoint import hf_mapping
from moonlight.placement.param_groups import MATRIX_GROUPS, find_monitor_group
from moonlight.studies.ladder import OPTIMIZERS, Ladder, LadderRun, best_points
from moonlight.studies.measured import Measured, iter_matrices, measure
from moonlight.studies.results import StudyResult, losses, markdown_table

SPECTRA_FILE = "svd_entropy.json"


@dataclass(frozen=True)
class Pair:
    """SVD entropy of one matrix under each optimizer, between 0 and 1."""

    size: str
    group: str
    """One of MATRIX_GROUPS."""
    muon: float
    adamw: float


def compute_entropies(run_folder: Path) -> dict[str, float]:
    """Return the entropy of each matrix of `iter_matrices`, by its Hugging Face name."""
    from moonlight.optim.svd_entropy import svd_entropy

    return {name: svd_entropy(matrix) for name, matrix in iter_matrices(run_folder)}


def measure_entropies(ladder: Ladder, results: Mapping[LadderRun, StudyResult[LadderRun]]) -> Measured:
    """Return the entropies of the best runs, by run and Hugging Face name of the matrix."""
    return measure(ladder, best_points(ladder, losses(results)).values(), SPECTRA_FILE, compute_entropies)


def pair_entropies(
    ladder: Ladder, results: Mapping[LadderRun, StudyResult[LadderRun]], spectra: Measured
) -> list[Pair]:
    """Return every matrix that has an entropy in the best runs of both optimizers at one size."""
    best = best_points(ladder, losses(results))
    pairs = []
    for size in ladder.sizes:
        muon, adamw = (spectra.get(point.name, {}) if (point := best.get((size, name))) else {} for name in OPTIMIZERS)
        groups = {
            hf_tensor.name: find_monitor_group(mapping.key)
            for mapping in hf_mapping.tensor_mappings(ladder.make_config(ladder.representative_run(size)).model)
            for hf_tensor in mapping.hf_tensors
            if hf_tensor.init_kind == "matrix"
        }
        for name in muon:
            if name in adamw and name in groups and math.isfinite(muon[name] + adamw[name]):
                pairs.append(Pair(size, groups[name], muon[name], adamw[name]))
    return pairs


def spectra_text(pairs: Sequence[Pair]) -> str:
    """Return tables of how many matrices have a higher entropy under Muon, by size and by group."""
    higher = sum(pair.muon > pair.adamw for pair in pairs)
    sizes = list(dict.fromkeys(pair.size for pair in pairs))
    groups = [name for name in MATRIX_GROUPS if any(pair.group == name for pair in pairs)]
    return "\n\n".join(
        [
            "SVD entropy of every matrix, same FLOPs, each optimizer at its best learning rate:",
            _table("size", {size: [pair for pair in pairs if pair.size == size] for size in sizes}),
            _table("group", {name: [pair for pair in pairs if pair.group == name] for name in groups}),
            f"The entropy is higher under Muon in {higher} of {len(pairs)} matrices, {100 * higher / len(pairs):.1f}%.",
        ]
    )


def _table(header: str, parts: Mapping[str, Sequence[Pair]]) -> str:
    rows = []
    for name, pairs in parts.items():
        higher = sum(pair.muon > pair.adamw for pair in pairs)
        muon, adamw = fmean(pair.muon for pair in pairs), fmean(pair.adamw for pair in pairs)
        rows.append((name, str(len(pairs)), str(higher), f"{muon:.4f}", f"{adamw:.4f}"))
    return markdown_table((header, "matrices", "Muon higher in", "mean, Muon", "mean, AdamW"), rows)
