"""SVD entropy of every matrix of the best runs of a ladder: does Muon use more directions than AdamW?

Training watches means over groups; here every matrix is looked at, in the checkpoint that the run ended with.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from moonlight.dist_checkpoint import hf_mapping
from moonlight.placement.param_groups import MATRIX_GROUPS, find_monitor_group
from moonlight.studies.ladder import OPTIMIZERS, Ladder, LadderRun, best_points
from moonlight.studies.measured import Measured, iter_matrices, measure
from moonlight.studies.results import StudyResult, losses

SPECTRA_FILE = "svd_entropy.json"


@dataclass(frozen=True)
class Pair:
    """One matrix's entropy under each optimizer."""

    size: str
    group: str
    """One of MATRIX_GROUPS."""
    muon: float
    adamw: float


def compute_entropies(run_folder: Path) -> dict[str, float]:
    """Entropy of each of `iter_matrices`."""
    from moonlight.optim.svd_entropy import svd_entropy

    return {name: svd_entropy(matrix) for name, matrix in iter_matrices(run_folder)}


def measure_entropies(ladder: Ladder, results: Mapping[LadderRun, StudyResult[LadderRun]]) -> Measured:
    """Entropies of the best runs, by the Hugging Face names of their matrices."""
    return measure(ladder, best_points(ladder, losses(results)).values(), SPECTRA_FILE, compute_entropies)


def pair_entropies(
    ladder: Ladder, results: Mapping[LadderRun, StudyResult[LadderRun]], spectra: Measured
) -> list[Pair]:
    """Every matrix that was looked at in the best runs of both optimizers at one size."""
    best = best_points(ladder, losses(results))
    found = []
    for size in ladder.sizes:
        muon, adamw = (spectra.get(point.name, {}) if (point := best.get((size, name))) else {} for name in OPTIMIZERS)
        groups = {
            part.name: find_monitor_group(row.key)
            for row in hf_mapping.tensor_mappings(ladder.make_config(ladder.representative_run(size)).model)
            for part in row.hf_tensors
            if part.init_kind == "matrix"
        }
        for name in muon:
            if name in adamw and name in groups and math.isfinite(muon[name] + adamw[name]):
                found.append(Pair(size, groups[name], muon[name], adamw[name]))
    return found


def spectra_text(pairs: Sequence[Pair]) -> str:
    """In how many matrices Muon's entropy is the higher one, by size and by group."""
    higher = sum(pair.muon > pair.adamw for pair in pairs)
    sizes = list(dict.fromkeys(pair.size for pair in pairs))
    groups = [name for name in MATRIX_GROUPS if any(pair.group == name for pair in pairs)]
    return "\n".join(
        [
            "SVD entropy of every matrix, same budget, each optimizer at its best rate:\n",
            *_table("size", {size: [pair for pair in pairs if pair.size == size] for size in sizes}),
            "",
            *_table("group", {name: [pair for pair in pairs if pair.group == name] for name in groups}),
            "",
            f"Muon's is higher in {higher} of {len(pairs)} matrices, {100 * higher / len(pairs):.1f}%.",
        ]
    )


def _table(head: str, parts: Mapping[str, Sequence[Pair]]) -> Iterator[str]:
    yield f"| {head} | matrices | Muon higher in | mean, Muon | mean, AdamW |"
    yield "|---|---|---|---|---|"
    for name, pairs in parts.items():
        higher = sum(pair.muon > pair.adamw for pair in pairs)
        muon, adamw = fmean(pair.muon for pair in pairs), fmean(pair.adamw for pair in pairs)
        yield f"| {name} | {len(pairs)} | {higher} | {muon:.4f} | {adamw:.4f} |"
