"""A checkpoint of weights alone, written tensor by tensor in one process: what is imported or averaged."""

import dataclasses
from collections.abc import Callable
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
"""Room for tokenizer and index."""

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
    """Write the checkpoint `out`, whole or not at all.

    Args:
        name: of the work, for the progress bar.
        run: the recipe that trained the weights; None if that is not known.
        origin: what the checkpoint was made from; it tells that it holds no optimizer state.
        dtypes: what each checkpoint tensor is stored in, by its key.
        read: a tensor as Hugging Face shapes it, in that dtype.
        add_files: puts more files into the folder that it is given, such as a tokenizer.

    Raises:
        UserError: no room.
    """
    rows = hf_mapping.tensor_mappings(model_config)
    total = sum(torch.Size(row.shape).numel() * dtypes[row.key].itemsize for row in rows)
    check_space(out, total + BESIDE_WEIGHTS_BYTES)
    done = 0
    with atomic_folder(out) as part, byte_progress(name, total) as advance:

        def maker(
            row: hf_mapping.TensorMapping, hf: hf_mapping.HFTensor, sizes: tuple[int, ...]
        ) -> Callable[[], torch.Tensor]:
            def make() -> torch.Tensor:
                nonlocal done
                value = read(row, hf)
                assert tuple(value.shape) == hf.shape, (hf.name, value.shape)
                done += value.nbytes
                advance(done)
                return value.view(sizes)

            return make

        tensors = {}
        for row in rows:
            rectangles = {}
            for hf in row.hf_tensors:
                offset, sizes = hf_mapping.offset_and_sizes(hf, row)
                rectangles[offset] = (sizes, maker(row, hf, sizes))
            tensors[row.key] = LazyTensor(row.shape, dtypes[row.key], rectangles)
        files = save_tensors(part, tensors)
        before = {part / name for name in files}
        add_files(part)
        for file in sorted(file for file in part.rglob("*") if file.is_file() and file not in before):
            known = {"bytes": file.stat().st_size, "xxh3": xxh3_checksum(file)}
            files[file.relative_to(part).as_posix()] = known
        content = {
            "state": dataclasses.asdict(state),
            "recipe": dataclasses.asdict(config) if config else {"model": dataclasses.asdict(model_config)},
            "origin": origin,
            "tokenizer_sha256": tokenizer_sha256,
            "files": files,
        }
        write_state(part, content)


def is_up_to_date(out: Path, origin: dict[str, Any]) -> bool:
    """Whether `out` is a checkpoint of this origin, and whole.

    Raises:
        UserError: it is something else, or damaged.
    """
    check_output(out, STATE_FILE)
    if not out.exists():
        return False
    if read_state(out, check_files=False).get("origin") != origin:
        raise output_conflict_error(out)
    read_state(out)
    return True
