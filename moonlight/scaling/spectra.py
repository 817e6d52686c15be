"""SVD entropy of every matrix of the best runs of a ladder: does Muon use more directions than AdamW?

Training watches means over groups; here every matrix is looked at, in the checkpoint that the run ended with.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from moonlight import mapping
from moonlight.files import write_json
from moonlight.optim.groups import MATRIX_GROUPS, group_of
from moonlight.scaling.ladder import OPTIMIZERS, Ladder, Point, best_points
from moonlight.scaling.results import Result, losses
from moonlight.scaling.study import P, Study

if TYPE_CHECKING:
    import torch

SPECTRA_FILE = "svd_entropy.json"

Measured = dict[str, dict[str, float]]
"""By run and by name: an entropy by the Hugging Face name of its matrix."""


@dataclass(frozen=True)
class Pair:
    """One matrix's entropy under each optimizer."""

    size: str
    group: str
    """One of MATRIX_GROUPS."""
    muon: float
    adamw: float


def matrices_of(run_folder: Path) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Every matrix that Muon would move, by its Hugging Face name, from the run's newest checkpoint."""
    from checkpoints.reader import open_checkpoint

    checkpoint = open_checkpoint(run_folder)
    for row in mapping.table(checkpoint.model):
        for part in row.parts:
            if part.kind == "matrix" and group_of(row.key) in MATRIX_GROUPS:
                yield part.name, checkpoint.part(row, part)


def entropies_of(run_folder: Path) -> dict[str, float]:
    """Entropy of each of `matrices_of`."""
    from moonlight.optim.spectrum import entropy

    return {name: entropy(matrix) for name, matrix in matrices_of(run_folder)}


def read_measured(path: Path) -> Measured:
    """What has been measured already; what cannot be read is measured again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def measure(
    study: Study[P], points: Iterable[P], file_name: str, of_run: Callable[[Path], dict[str, float]]
) -> Measured:
    """`of_run` of the folders of `points`: from a file of the study, or from checkpoints and kept there."""
    path = study.home / file_name
    known, found = read_measured(path), {}
    for point in points:
        folder = study.home / "points" / point.name
        if point.name in known:
            found[point.name] = known[point.name]
        elif (folder / "checkpoints").is_dir():
            found[point.name] = of_run(folder)
    if found != known:
        write_json(path, found)
    return found


def look(ladder: Ladder, results: Mapping[Point, Result[Point]]) -> Measured:
    """Entropies of the best runs."""
    return measure(ladder, best_points(ladder, losses(results)).values(), SPECTRA_FILE, entropies_of)


def pairs_of(ladder: Ladder, results: Mapping[Point, Result[Point]], spectra: Measured) -> list[Pair]:
    """Every matrix that was looked at in the best runs of both optimizers at one size."""
    best = best_points(ladder, losses(results))
    found = []
    for size in ladder.sizes:
        muon, adamw = (spectra.get(point.name, {}) if (point := best.get((size, name))) else {} for name in OPTIMIZERS)
        groups = {
            part.name: group_of(row.key)
            for row in mapping.table(ladder.run(ladder.first_point(size)).model)
            for part in row.parts
            if part.kind == "matrix"
        }
        for name in muon:
            if name in adamw and math.isfinite(muon[name] + adamw[name]):
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
