"""A checkpoint's tensors in one process, without a process group and without Megatron."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moonlight.config.model import ModelConfig
from moonlight.config.run import RunConfig
from moonlight.dist_checkpoint import hf_mapping
from moonlight.dist_checkpoint.direct_io import direct_xxh3_checksum
from moonlight.dist_checkpoint.index import StoredTensors
from moonlight.dist_checkpoint.state import TrainState, check_file, read_state, resolve_checkpoint, stored_config
from moonlight.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint: what it is of, where it stands, and its tensors. None of them is in memory."""

    folder: Path
    model_config: ModelConfig
    config: RunConfig | None
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
        return Path(self.config.data.tokenizer) if self.config else None

    @property
    def run_folder(self) -> Path | None:
        """Folder of the run that wrote it, for its metrics; None for one that no run wrote."""
        return self.folder.parent.parent if self.config and not self.origin else None

    def read_hf_tensor(self, row: hf_mapping.TensorMapping, part: hf_mapping.HFTensor) -> torch.Tensor:
        """One tensor as Hugging Face shapes it, in the dtype it is stored in, read past the page cache.

        Tied embeddings are the head, too.
        """
        key = row.key
        if key == HEAD and self.model_config.tie_word_embeddings:
            key = EMBEDDING
        value: torch.Tensor | None = None
        for offset, sizes in self.stored.chunks(key).items():
            if common := hf_mapping.overlap(part, row, offset, sizes):
                part_index, rectangle_index = common
                found = self.stored.read_chunk(key, offset, sizes, rectangle_index)
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
        for offset, sizes in self.stored.chunks(key).items():
            where = tuple(slice(begin, begin + size) for begin, size in zip(offset, sizes, strict=True))
            whole[where] = self.stored.mmap_chunk(key, offset, sizes)
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
    folder = resolve_checkpoint(path, step)
    content = read_state(folder, check_files=False)
    for name in content["files"]:
        check_file(folder, name, content, direct_xxh3_checksum)
    model_config, config = stored_config(content)
    stored = StoredTensors(folder)
    shapes = stored.shapes
    for row in hf_mapping.tensor_mappings(model_config):
        if shapes.get(row.key) != row.shape:
            raise UserError(f"checkpoint {folder}: {row.key} has shape {shapes.get(row.key)}, expected {row.shape}")
    return Checkpoint(
        folder=folder,
        model_config=model_config,
        config=config,
        state=TrainState.from_json(content["state"]),
        origin=content.get("origin", {}),
        tokenizer_sha256=content["tokenizer_sha256"],
        stored=stored,
    )
