"""What is measured on the checkpoints of a study's runs, once: it is kept in a file beside the results."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moonlight.dist_checkpoint import hf_mapping
from moonlight.files import write_json
from moonlight.placement.param_groups import MATRIX_GROUPS, find_monitor_group
from moonlight.studies.study import P, Study

if TYPE_CHECKING:
    import torch

Measured = dict[str, dict[str, float]]
"""By run, and by what was measured."""


def iter_matrices(run_folder: Path) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Every matrix that Muon would move, by its Hugging Face name, from the run's newest checkpoint."""
    from checkpoints.reader import open_checkpoint

    checkpoint = open_checkpoint(run_folder)
    for row in hf_mapping.tensor_mappings(checkpoint.model_config):
        for part in row.hf_tensors:
            if part.init_kind == "matrix" and find_monitor_group(row.key) in MATRIX_GROUPS:
                yield part.name, checkpoint.read_hf_tensor(row, part)


def read_measured(path: Path) -> Measured:
    """What has been measured already; what cannot be read is measured again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    known = isinstance(content, dict) and all(isinstance(own, dict) for own in content.values())
    known = known and all(isinstance(value, float | int) for own in content.values() for value in own.values())
    return content if known else {}


def measure(
    study: Study[P], points: Iterable[P], file_name: str, of_run: Callable[[Path], dict[str, float]]
) -> Measured:
    """`of_run` of the folders of `points`: from a file of the study, or from checkpoints and kept there."""
    path = study.folder_path / file_name
    known, found = read_measured(path), {}
    for point in points:
        folder = study.folder_path / "points" / point.name
        if point.name in known:
            found[point.name] = known[point.name]
        elif (folder / "checkpoints").is_dir():
            found[point.name] = of_run(folder)
    if found != known:
        write_json(path, found)
    return found
