"""SVD entropy of every matrix of the best runs of a ladder: does Muon use more directions than AdamW?

Training watches means over groups; here every matrix is looked at, in the checkpoint that the run ended with.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from moonlight.dist_checkpoint import hf_mapping
from moonlight.placement.param_groups import MATRIX_GROUPS, group_of
from moonlight.studies.ladder import OPTIMIZERS, Ladder, Point, best_points
from moonlight.studies.measured import Measured, matrices_of, measure
from moonlight.studies.results import Result, losses

SPECTRA_FILE = "svd_entropy.json"


@dataclass(frozen=True)
class Pair:
    """One matrix's entropy under each optimizer."""

    size: str
    group: str
    """One of MATRIX_GROUPS."""
    muon: float
    adamw: float


def entropies_of(run_folder: Path) -> dict[str, float]:
    """Entropy of each of `matrices_of`."""
    from moonlight.optim.svd_entropy import entropy

    return {name: entropy(matrix) for name, matrix in matrices_of(run_folder)}


def look(ladder: Ladder, results: Mapping[Point, Result[Point]]) -> Measured:
    """Entropies of the best runs, by the Hugging Face names of their matrices."""
    return measure(ladder, best_points(ladder, losses(results)).values(), SPECTRA_FILE, entropies_of)


def pairs_of(ladder: Ladder, results: Mapping[Point, Result[Point]], spectra: Measured) -> list[Pair]:
    """Every matrix that was looked at in the best runs of both optimizers at one size."""
    best = best_points(ladder, losses(results))
    found = []
    for size in ladder.sizes:
        muon, adamw = (spectra.get(point.name, {}) if (point := best.get((size, name))) else {} for name in OPTIMIZERS)
        groups = {
            part.name: group_of(row.key)
            for row in hf_mapping.table(ladder.run(ladder.first_point(size)).model)
            for part in row.parts
            if part.kind == "matrix"
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
