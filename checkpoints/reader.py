"""Whole tensors from a checkpoint in one process, without a process group and without Megatron."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from moonlight import mapping
from moonlight.config import Run
from moonlight.config_io import from_dict
from moonlight.errors import UserError
from moonlight.train.checkpoint_files import find, read_state
from moonlight.train.index import IndexReader, cause_raised, read_index, whole_shapes


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint: its recipe, where it stands, and its tensors by name."""

    folder: Path
    run: Run
    step: int
    tokenizer_sha256: str
    """Checksum of the tokenizer that made the tokens it was trained on."""
    shapes: dict[str, tuple[int, ...]]

    def read(self, key: str) -> torch.Tensor:
        """One whole tensor as it was saved: float32 masters and momenta."""
        state = {key: torch.empty(self.shapes[key], dtype=torch.float32)}
        with cause_raised():
            dcp.load(state, storage_reader=IndexReader(self.folder), no_dist=True)
        return state[key]

    def hugging_face_tensors(self) -> Iterator[tuple[mapping.Part, torch.Tensor]]:
        """Every tensor of the model as Hugging Face lays it out, float32, from one checkpoint tensor at a time."""
        for row in mapping.table(self.run.model):
            whole = self.read(row.key)
            for part in row.parts:
                value = whole[part.index]
                yield part, (value.T if part.transposed else value).contiguous()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint, or the newest one of a run folder, after checking its files and its tensors' names and shapes.

    Raises:
        UserError: there is none, it is damaged, or it lacks a tensor that its own recipe asks for.
    """
    folder = find(path)
    content = read_state(folder)
    run = from_dict(content["recipe"])
    shapes = whole_shapes(read_index(folder))
    for row in mapping.table(run.model):
        if shapes.get(row.key) != row.shape:
            raise UserError(f"checkpoint {folder}: {row.key} has shape {shapes.get(row.key)}, expected {row.shape}")
    return Checkpoint(
        folder=folder,
        run=run,
        step=content["state"]["step"],
        tokenizer_sha256=content["tokenizer_sha256"],
        shapes=shapes,
    )
