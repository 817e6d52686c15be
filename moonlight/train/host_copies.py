"""Copies in host memory of what a rank writes into a checkpoint."""

from collections.abc import Iterable

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan

from moonlight.model.pieces import Pieces
from moonlight.train.checkpoint_tensors import ALIGNMENT


class HostCopies:
    """Host memory for the rectangles that a rank writes, kept from save to save.

    Fresh memory would cost more time than the copy does, and so would turning what lies transposed, which is therefore
    left to the writing thread. With CUDA the memory is page-locked, and copies take their turn among other kernels.
    """

    def __init__(self, plan: SavePlan, tensors: dict[str, Pieces]) -> None:
        sources = {item.index: tensors[item.index.fqn].__get_tensor_shard__(item.index) for item in plan.items}
        room = [-(-source.nbytes // ALIGNMENT) * ALIGNMENT for source in sources.values()]
        memory = torch.zeros(sum(room), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._at: dict[MetadataIndex, torch.Tensor] = {}
        begin = 0
        for (index, source), nbytes in zip(sources.items(), room, strict=True):
            strides = torch.empty_like(source, device="meta").stride()  # of the same order, without gaps
            values = memory[begin : begin + source.nbytes].view(source.dtype)
            self._at[index] = values.as_strided(source.shape, strides)
            begin += nbytes

    def fill(self, parts: Iterable[dict[str, Pieces]]) -> None:
        """Copy all rectangles; they are there when this returns."""
        left = set(self._at)
        for key, pieces in (item for part in parts for item in part.items()):
            for offset, values in pieces.rectangles:
                index = MetadataIndex(key, offset)
                if index in left:  # else another rank writes it
                    self._at[index].copy_(values, non_blocking=True)
                    left.remove(index)
        assert not left, left
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def at(self, index: MetadataIndex) -> torch.Tensor:
        """One rectangle."""
        return self._at[index]
