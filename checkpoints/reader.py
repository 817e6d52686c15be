"""Reader of a checkpoint's tensors in one process, without process group or Megatron."""

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
from moonlight.plan.flops import EMBEDDING, HEAD

TOKENIZER_FOLDER = "tokenizer"
"""Folder of the tokenizer in a checkpoint that has a copy."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint: model, recipe, training state, and tensors, which are read on demand."""

    folder: Path
    model_config: ModelConfig
    config: RunConfig | None
    """The recipe of the run; None for an imported checkpoint."""
    state: TrainState
    origin: dict[str, Any]
    """Source of an imported or averaged checkpoint; empty if a run saved it. See `checkpoints.writer`."""
    tokenizer_sha256: str
    """Checksum of the tokenizer of the training data; empty if unknown."""
    stored: StoredTensors

    @property
    def tokenizer(self) -> Path | None:
        """Folder of the tokenizer: the copy in the checkpoint, or the one in the recipe; None without either."""
        copy = self.folder / TOKENIZER_FOLDER
        if copy.is_dir():
            return copy
        return Path(self.config.data.tokenizer) if self.config else None

    @property
    def run_folder(self) -> Path | None:
        """Folder of the run that saved it; None if no run did."""
        return self.folder.parent.parent if self.config and not self.origin else None

    def read_hf_tensor(self, mapping: hf_mapping.TensorMapping, hf_tensor: hf_mapping.HFTensor) -> torch.Tensor:
        """Read one tensor in Hugging Face shape and in its stored dtype, bypassing the page cache.

        In a tied model, the embedding is also read as the head.
        """
        key = mapping.key
        if key == HEAD and self.model_config.tie_word_embeddings:
            key = EMBEDDING
        value: torch.Tensor | None = None
        for offset, sizes in self.stored.chunks(key).items():
            if common := hf_mapping.overlap(hf_tensor, mapping, offset, sizes):
                tensor_index, chunk_index = common
                chunk = self.stored.read_chunk(key, offset, sizes, chunk_index)
                if tuple(chunk.shape) == hf_tensor.shape:
                    return chunk
                if value is None:
                    value = torch.empty(hf_tensor.shape, dtype=chunk.dtype)
                value[tensor_index] = chunk
        assert value is not None, hf_tensor.name
        return value

    def read(self, key: str) -> torch.Tensor:
        """Read one full tensor of the checkpoint, by checkpoint key, as float32."""
        full = torch.empty(self.stored.shapes[key])
        for offset, sizes in self.stored.chunks(key).items():
            index = tuple(slice(start, start + size) for start, size in zip(offset, sizes, strict=True))
            full[index] = self.stored.mmap_chunk(key, offset, sizes)
        return full


def open_checkpoint(path: Path, step: int | None = None) -> Checkpoint:
    """Open a checkpoint, or one of a run folder; check its files and the names and shapes of its tensors.

    Args:
        step: step of the checkpoint in a run folder; None takes the newest.

    Raises:
        UserError: no checkpoint exists, it is corrupt, or it lacks a tensor of its model.
    """
    folder = resolve_checkpoint(path, step)
    content = read_state(folder, check_files=False)
    for name in content["files"]:
        check_file(folder, name, content, direct_xxh3_checksum)
    model_config, config = stored_config(content)
    stored = StoredTensors(folder)
    shapes = stored.shapes
    for mapping in hf_mapping.tensor_mappings(model_config):
        key, shape = mapping.key, shapes.get(mapping.key)
        if shape != mapping.shape:
            raise UserError(f"checkpoint {folder}: {key} has shape {shape}, expected {mapping.shape}")
    return Checkpoint(
        folder=folder,
        model_config=model_config,
        config=config,
        state=TrainState.from_json(content["state"]),
        origin=content.get("origin", {}),
        tokenizer_sha256=content["tokenizer_sha256"],
        stored=stored,
    )
