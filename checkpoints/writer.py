"""Writer of a checkpoint of weights only, imported or averaged, tensor by tensor in one process."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moonlight.config.model import ModelConfig
from moonlight.config.run import RunConfig
from moonlight.dist_checkpoint import hf_mapping
from moonlight.dist_checkpoint.chunks import LazyTensor
from moonlight.dist_checkpoint.state import STATE_FILE, TrainState, read_state, write_state
from moonlight.dist_checkpoint.tensors import save_tensors
from moonlight.files import atomic_folder, check_output, check_space, output_conflict_error, xxh3_checksum
from moonlight.progress import byte_progress

BESIDE_WEIGHTS_BYTES = 100 * 10**6
"""Disk space for all files other than the weights, such as tokenizer, index, model card and loss curve."""

Read = Callable[[hf_mapping.TensorMapping, hf_mapping.HFTensor], torch.Tensor]


def write_checkpoint(
    out: Path,
    name: str,
    *,
    model_config: ModelConfig,
    config: RunConfig | None,
    state: TrainState,
    origin: dict[str, Any],
    tokenizer_sha256: str,
    dtypes: dict[str, torch.dtype],
    read: Read,
    add_files: Callable[[Path], None],
) -> None:
    """Write the checkpoint `out` atomically.

    Args:
        name: label of the progress bar.
        config: the recipe that trained the weights; None if unknown.
        origin: source of the checkpoint; a checkpoint with an origin has no optimizer state.
        dtypes: stored dtype of each checkpoint tensor, by key.
        read: returns a tensor in Hugging Face shape and in that dtype.
        add_files: adds more files to the given folder, such as a tokenizer.

    Raises:
        UserError: too little disk space.
    """
    mappings = hf_mapping.tensor_mappings(model_config)
    total = sum(torch.Size(mapping.shape).numel() * dtypes[mapping.key].itemsize for mapping in mappings)
    check_space(out, total + BESIDE_WEIGHTS_BYTES)
    done = 0
    with atomic_folder(out) as part, byte_progress(name, total) as advance:

        def load(
            mapping: hf_mapping.TensorMapping, hf_tensor: hf_mapping.HFTensor, sizes: tuple[int, ...]
        ) -> torch.Tensor:
            nonlocal done
            value = read(mapping, hf_tensor)
            assert tuple(value.shape) == hf_tensor.shape, (hf_tensor.name, value.shape)
            done += value.nbytes
            advance(done)
            return value.view(sizes)

        tensors = {}
        for mapping in mappings:
            chunks = {}
            for hf_tensor in mapping.hf_tensors:
                offset, sizes = hf_mapping.offset_and_sizes(hf_tensor, mapping)
                chunks[offset] = (sizes, partial(load, mapping, hf_tensor, sizes))
            tensors[mapping.key] = LazyTensor(mapping.shape, dtypes[mapping.key], chunks)
        files = save_tensors(part, tensors)
        tensor_files = {part / name for name in files}
        add_files(part)
        for file in sorted(file for file in part.rglob("*") if file.is_file() and file not in tensor_files):
            entry = {"bytes": file.stat().st_size, "xxh3": xxh3_checksum(file)}
            files[file.relative_to(part).as_posix()] = entry
        content = {
            "state": dataclasses.asdict(state),
            "recipe": dataclasses.asdict(config) if config else {"model": dataclasses.asdict(model_config)},
            "origin": origin,
            "tokenizer_sha256": tokenizer_sha256,
            "files": files,
        }
        write_state(part, content)


def is_up_to_date(out: Path, origin: dict[str, Any]) -> bool:
    """Return True if `out` is a valid checkpoint of this origin, False if it does not exist.

    Raises:
        UserError: `out` exists with different content, or is corrupt.
    """
    check_output(out, STATE_FILE)
    if not out.exists():
        return False
    if read_state(out, check_files=False).get("origin") != origin:
        raise output_conflict_error(out)
    read_state(out)
    return True
