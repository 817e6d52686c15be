"""Average of the newest checkpoints of a run, tensor by tensor in one process."""

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

    Sums are float64, the stored mean is float32. The result has no optimizer state: export it, or set it as
    train.initial_checkpoint of a new run.

    Returns:
        Steps of the checkpoints; an empty list if `out` already is their mean.

    Raises:
        UserError: too few checkpoints, a corrupt one, too little disk space, or `out` exists with different content.
    """
    if last < 2:
        raise UserError(f"--last is {last}: it must be at least 2")
    check_output(out, STATE_FILE)
    folders = complete_checkpoints(run_dir)
    if len(folders) < last:
        if not run_dir.exists():
            raise UserError(f"{run_dir} does not exist: give a run folder")
        raise UserError(f"--last is {last}: {run_dir} has {len(folders)} checkpoints. See train.keep_checkpoints")
    checkpoints = [open_checkpoint(folder) for folder in folders[-last:]]
    newest = checkpoints[-1]
    steps = [checkpoint.state.step for checkpoint in checkpoints]
    for checkpoint, step in zip(checkpoints, steps, strict=True):
        if checkpoint.model_config != newest.model_config or checkpoint.tokenizer_sha256 != newest.tokenizer_sha256:
            raise UserError(
                f"{run_dir}: the checkpoints after steps {step} and {steps[-1]} have different models or tokenizers"
            )
    origin: dict[str, Any] = {
        "averaged_steps": steps,
        "states_sha256": [sha256_checksum(checkpoint.folder / STATE_FILE) for checkpoint in checkpoints],
    }
    if is_up_to_date(out, origin):
        return []

    def mean(mapping: hf_mapping.TensorMapping, hf_tensor: hf_mapping.HFTensor) -> torch.Tensor:
        total = torch.zeros(hf_tensor.shape, dtype=torch.float64)
        for checkpoint in checkpoints:
            total += checkpoint.read_hf_tensor(mapping, hf_tensor)
        return (total / last).float()

    write_checkpoint(
        out,
        "averaging",
        model_config=newest.model_config,
        config=newest.config,
        state=newest.state,
        origin=origin,
        tokenizer_sha256=newest.tokenizer_sha256,
        dtypes={mapping.key: torch.float32 for mapping in hf_mapping.tensor_mappings(newest.model_config)},
        read=mean,
        add_files=lambda folder: None,
    )
    return steps
