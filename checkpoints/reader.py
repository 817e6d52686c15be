"""A checkpoint's tensors in one process, without a process group and without Megatron."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moonlight.config.model import Model
from moonlight.config.run import Run
from moonlight.dist_checkpoint import hf_mapping
from moonlight.dist_checkpoint.direct_io import direct_checksum_of
from moonlight.dist_checkpoint.index import StoredTensors
from moonlight.dist_checkpoint.state import TrainState, check_file, find, read_state, recipe_of
from moonlight.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint: what it is of, where it stands, and its tensors. None of them is in memory."""

    folder: Path
    model: Model
    run: Run | None
    """The recipe that trained it; None for one that was imported."""
    state: TrainState
    origin: dict[str, Any]
    """How it was made, where no training step wrote it: see `checkpoints.writer`."""
    tokenizer_sha256: str
    """Checksum of the tokenizer that made the tokens it was trained on; empty if that is not known."""
    stored: StoredTensors

    @property
    def tokenizer(self) -> Path | None:
        """Folder of its tokenizer: its own copy, or the one that its recipe names."""
        own = self.folder / TOKENIZER_FOLDER
        if own.is_dir():
            return own
        return Path(self.run.data.tokenizer) if self.run else None

    @property
    def run_folder(self) -> Path | None:
        """Folder of the run that wrote it, for its metrics; None for one that no run wrote."""
        return self.folder.parent.parent if self.run and not self.origin else None

    def part(self, row: hf_mapping.Row, part: hf_mapping.Part) -> torch.Tensor:
        """One tensor as Hugging Face shapes it, in the dtype it is stored in, read past the page cache.

        Tied embeddings are the head, too.
        """
        key = row.key
        if key == HEAD and self.model.tie_word_embeddings:
            key = EMBEDDING
        value: torch.Tensor | None = None
        for offset, sizes in self.stored.rectangles(key).items():
            if common := hf_mapping.overlap(part, row, offset, sizes):
                part_index, rectangle_index = common
                found = self.stored.read(key, offset, sizes, rectangle_index)
                if tuple(found.shape) == part.shape:
                    return found
                if value is None:
                    value = torch.empty(part.shape, dtype=found.dtype)
                value[part_index] = found
        assert value is not None, part.name
        return value

    def read(self, key: str) -> torch.Tensor:
        """One whole tensor of the checkpoint, float32."""
        whole = torch.empty(self.stored.shapes[key])
        for offset, sizes in self.stored.rectangles(key).items():
            where = tuple(slice(begin, begin + size) for begin, size in zip(offset, sizes, strict=True))
            whole[where] = self.stored.map(key, offset, sizes)
        return whole


EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
TOKENIZER_FOLDER = "tokenizer"
"""Of a checkpoint that brings its tokenizer."""


def open_checkpoint(path: Path, step: int | None = None) -> Checkpoint:
    """Open a checkpoint, or one of a run folder, after checking its files and its tensors' names and shapes.

    Args:
        step: which one of a run folder; None takes the newest.

    Raises:
        UserError: there is none, it is damaged, or it lacks a tensor that its own recipe asks for.
    """
    folder = find(path, step)
    content = read_state(folder, check_files=False)
    for name in content["files"]:
        check_file(folder, name, content, direct_checksum_of)
    model, run = recipe_of(content)
    stored = StoredTensors(folder)
    shapes = stored.shapes
    for row in hf_mapping.table(model):
        if shapes.get(row.key) != row.shape:
            raise UserError(f"checkpoint {folder}: {row.key} has shape {shapes.get(row.key)}, expected {row.shape}")
    return Checkpoint(
        folder=folder,
        model=model,
        run=run,
        state=TrainState.from_json(content["state"]),
        origin=content.get("origin", {}),
        tokenizer_sha256=content["tokenizer_sha256"],
        stored=stored,
    )
