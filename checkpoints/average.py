"""The mean of a run's newest checkpoints, tensor by tensor in one process."""

from pathlib import Path
from typing import Any

import torch

from checkpoints.reader import open_checkpoint
from checkpoints.writer import is_up_to_date, write_checkpoint
from moonlight.dist_checkpoint import hf_mapping
from moonlight.dist_checkpoint.state import STATE_FILE, complete_checkpoints
from moonlight.errors import UserError
from moonlight.files import check_output, sha256_checksum


def average(run_dir: Path, last: int, out: Path) -> list[int]:
    """Write the checkpoint `out`, whose weights are the mean of the newest `last` checkpoints of a run.

    Sums are float64. The result has no optimizer state: it is to be exported, or to start another run from.

    Returns:
        Steps of the checkpoints; none if `out` already was their mean.

    Raises:
        UserError: too few checkpoints, a damaged one, no room, or `out` exists with something else in it.
    """
    if last < 2:
        raise UserError(f"--last is {last}: it must be at least 2")
    check_output(out, STATE_FILE)
    folders = complete_checkpoints(run_dir)
    if len(folders) < last:
        if not run_dir.exists():
            raise UserError(f"{run_dir} does not exist: give a run folder")
        raise UserError(f"{run_dir} has {len(folders)} of the {last} checkpoints of --last: see train.keep_checkpoints")
    checkpoints = [open_checkpoint(folder) for folder in folders[-last:]]
    newest = checkpoints[-1]
    steps = [checkpoint.state.step for checkpoint in checkpoints]
    for checkpoint, step in zip(checkpoints, steps, strict=True):
        if checkpoint.model_config != newest.model_config or checkpoint.tokenizer_sha256 != newest.tokenizer_sha256:
            raise UserError(
                f"{run_dir}: the checkpoint after step {step} is of another model than that after {steps[-1]}"
            )
    origin: dict[str, Any] = {
        "averaged_steps": steps,
        "states_sha256": [sha256_checksum(checkpoint.folder / STATE_FILE) for checkpoint in checkpoints],
    }
    if is_up_to_date(out, origin):
        return []

    def mean(row: hf_mapping.TensorMapping, part: hf_mapping.HFTensor) -> torch.Tensor:
        total = torch.zeros(part.shape, dtype=torch.float64)
        for checkpoint in checkpoints:
            total += checkpoint.read_hf_tensor(row, part)
        return (total / last).float()

    write_checkpoint(
        out,
        "averaging",
        model_config=newest.model_config,
        config=newest.config,
        state=newest.state,
        origin=origin,
        tokenizer_sha256=newest.tokenizer_sha256,
        dtypes={row.key: torch.float32 for row in hf_mapping.tensor_mappings(newest.model_config)},
        read=mean,
        add_files=lambda part: None,
    )
    return steps
