"""Measurements of the checkpoints of a study's runs, made once and cached in a file next to the results."""

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
"""Run name -> name of the measurement -> value."""


def iter_matrices(run_folder: Path) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yield every matrix that Muon updates, with its Hugging Face name, from the run's newest checkpoint."""
    from checkpoints.reader import open_checkpoint

    checkpoint = open_checkpoint(run_folder)
    for mapping in hf_mapping.tensor_mappings(checkpoint.model_config):
        for hf_tensor in mapping.hf_tensors:
            if hf_tensor.init_kind == "matrix" and find_monitor_group(mapping.key) in MATRIX_GROUPS:
                yield hf_tensor.name, checkpoint.read_hf_tensor(mapping, hf_tensor)


def read_measured(path: Path) -> Measured:
    """Return the cached measurements; a file that is missing or invalid counts as empty."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_valid = isinstance(content, dict) and all(isinstance(values, dict) for values in content.values())
    is_valid = is_valid and all(
        isinstance(value, float | int) for values in content.values() for value in values.values()
    )
    return content if is_valid else {}


def measure(
    study: Study[P], points: Iterable[P], file_name: str, measure_run: Callable[[Path], dict[str, float]]
) -> Measured:
    """Return the measurements of `points`, from `file_name` in the study's folder or from `measure_run(run folder)`.

    New measurements are written to the file. Runs without checkpoints are skipped.
    """
    path = study.folder_path / file_name
    cached, measured = read_measured(path), {}
    for point in points:
        folder = study.folder_path / "points" / point.name
        if point.name in cached:
            measured[point.name] = cached[point.name]
        elif (folder / "checkpoints").is_dir():
            measured[point.name] = measure_run(folder)
    if measured != cached:
        write_json(path, measured)
    return measured
