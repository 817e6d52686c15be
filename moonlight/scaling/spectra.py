"""SVD entropy of every matrix of the best runs of a ladder: does Muon use more directions than AdamW?

Training watches means over groups; here every matrix is looked at, in the checkpoint that the run ended with.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from moonlight.files import write_json
from moonlight.scaling.ladder import OPTIMIZERS, Ladder, Point, best_points
from moonlight.scaling.results import Result, losses

SPECTRA_FILE = "svd_entropy.json"

Spectra = dict[str, dict[str, float]]
"""Entropy by run and by Hugging Face name of the matrix."""


def entropies_of(run_folder: Path) -> dict[str, float]:
    """Entropy of every matrix that Muon would move, by its Hugging Face name, from the run's newest checkpoint."""
    from checkpoints.reader import open_checkpoint
    from moonlight import mapping
    from moonlight.optim.groups import MATRIX_GROUPS, group_of
    from moonlight.optim.spectrum import entropy

    checkpoint = open_checkpoint(run_folder)
    found = {}
    for row in mapping.table(checkpoint.model):
        for part in row.parts:
            if part.kind == "matrix" and group_of(row.key) in MATRIX_GROUPS:
                found[part.name] = entropy(checkpoint.part(row, part))
    return found


def read_spectra(ladder: Ladder) -> Spectra:
    """What has been looked at already; what cannot be read is made again."""
    try:
        content = json.loads((ladder.home / SPECTRA_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def look(ladder: Ladder, results: Mapping[Point, Result]) -> Spectra:
    """Entropies of the best runs, those that are not in the ladder's folder yet from their checkpoints."""
    best = best_points(ladder, losses(results)).values()
    known = read_spectra(ladder)
    spectra = {}
    for point in best:
        folder = ladder.home / "points" / point.name
        if point.name in known:
            spectra[point.name] = known[point.name]
        elif (folder / "checkpoints").is_dir():
            spectra[point.name] = entropies_of(folder)
    if spectra != known:
        write_json(ladder.home / SPECTRA_FILE, spectra)
    return spectra


def compare_spectra(ladder: Ladder, results: Mapping[Point, Result], spectra: Spectra) -> str:
    """In how many matrices Muon's entropy is the higher one, by size; empty where nothing was looked at."""
    best = best_points(ladder, losses(results))
    lines = ["| size | matrices | Muon higher in | mean, Muon | mean, AdamW |", "|---|---|---|---|---|"]
    higher_in_all, in_all = 0, 0
    for size in ladder.sizes:
        pair = [best.get((size, name)) for name in OPTIMIZERS]
        muon, adamw = (spectra.get(point.name, {}) if point else {} for point in pair)
        names = [name for name in muon if name in adamw and math.isfinite(muon[name] + adamw[name])]
        if not names:
            continue
        higher = sum(muon[name] > adamw[name] for name in names)
        higher_in_all, in_all = higher_in_all + higher, in_all + len(names)
        means = " | ".join(f"{_mean([one[name] for name in names]):.4f}" for one in (muon, adamw))
        lines.append(f"| {size} | {len(names)} | {higher} | {means} |")
    if not in_all:
        return ""
    share = f"Muon's is higher in {higher_in_all} of {in_all} matrices, {100 * higher_in_all / in_all:.1f}%."
    return "\n".join(
        ["SVD entropy of every matrix, same budget, each optimizer at its best rate:\n", *lines, "", share]
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
