"""Master weights: the float32 values that the optimizer updates. The model holds a rounded copy.

A float32 model is its own master. For a bfloat16 model, the master is one of two kinds:

- float32: a float32 tensor next to the model's weights.
- split: the model's bfloat16 weights, and an int16 tensor with the 16 bits that rounding drops. Both together are the
  same float32 values in half the additional memory.
"""

from collections.abc import Sequence

import torch

from moonlight.optim.update_rules import apply_updates, can_fuse

_HALF = 0x8000


def round_to_bfloat16(master: torch.Tensor) -> torch.Tensor:
    """Round float32 to the nearest bfloat16, ties away from zero.

    All ties go one way, unlike in torch, which rounds to even. Exactly 2^16 floats then round to each bfloat16, so 16
    bits identify the float.
    """
    return ((master.view(torch.int32) + _HALF) >> 16).to(torch.int16).view(torch.bfloat16)


def low_bits(master: torch.Tensor) -> torch.Tensor:
    """Return what `round_to_bfloat16` drops, int16: the difference of the two bit patterns."""
    return (((master.view(torch.int32) + _HALF) & 0xFFFF) - _HALF).to(torch.int16)


def join_halves(rounded: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """Return the float32 master of a bfloat16 weight and its int16 remainder, exactly."""
    return ((rounded.view(torch.int16).to(torch.int32) << 16) + remainder).view(torch.float32)


class MasterWeight:
    """The master weights of some rows of a parameter. `weights` is a view [rows, columns] of the model's weights."""

    def __init__(self, weights: torch.Tensor, kind: str) -> None:
        """Start from the model's weights; `kind` is float32 or split."""
        self.weights = weights
        self._full = self._remainder = None
        if weights.dtype is torch.bfloat16 and kind == "split":
            self._remainder = torch.zeros_like(weights, dtype=torch.int16)
        elif weights.dtype is torch.bfloat16:
            self._full = weights.float()

    def to_float32(self) -> torch.Tensor:
        """Return the float32 values [rows, columns]; for split masters a new tensor. After a change, call `write`."""
        if self._remainder is not None:
            return join_halves(self.weights, self._remainder)
        return self.weights if self._full is None else self._full

    def to_float32_on_host(self) -> torch.Tensor:
        """Return `to_float32()`, for split masters in host memory: float32 of a full model may not fit on the GPU."""
        return self.to_float32() if self._remainder is None else self.to_float32().cpu()

    def to_meta(self) -> torch.Tensor:
        """Return `to_float32()`, for split masters a meta tensor of that shape and dtype."""
        return self.to_float32() if self._remainder is None else self.weights.to("meta", torch.float32)

    def write(self, values: torch.Tensor) -> None:
        """Store changed values of `to_float32` or `to_float32_on_host`, and round them into the model."""
        values = values.to(self.weights.device)
        if self._remainder is not None:
            self._remainder.copy_(low_bits(values))
        if self.weights.dtype is torch.bfloat16:
            self.weights.copy_(round_to_bfloat16(values))

    def rows(self, start: int, stop: int) -> "MasterWeight":
        """Return the master weights of the rows [start, stop), as views."""
        part = object.__new__(MasterWeight)
        part.weights = self.weights[start:stop]
        part._full = None if self._full is None else self._full[start:stop]
        part._remainder = None if self._remainder is None else self._remainder[start:stop]
        return part

    def state_bytes(self) -> int:
        """Return the bytes of memory in addition to the model's weights."""
        return sum(t.numel() * t.element_size() for t in (self._full, self._remainder) if t is not None)


def apply_update(
    masters: Sequence[MasterWeight],
    updates: Sequence[torch.Tensor],
    factors: Sequence[float],
    *,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """W <- W - lr (factor U + wd W) for each master, rounded into the model; one fused pass on a GPU.

    `updates` are [rows, columns] in any floating dtype, `factors` one for each master.
    """
    if all(master.weights.is_meta for master in masters):
        return  # the fused pass allocates nothing
    rates = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    if can_fuse([*(master.weights for master in masters), *updates]):
        from moonlight.kernels.muon_update import fused_weight_update

        for master, update, factor in zip(masters, updates, factors, strict=True):
            fused_weight_update(master._full, master.weights, master._remainder, update, factor=factor, **rates)
        return
    values = [master.to_float32() for master in masters]
    scaled = [u if factor == 1 else u.float() * factor for u, factor in zip(updates, factors, strict=True)]
    apply_updates(values, scaled, **rates)
    for master, value in zip(masters, values, strict=True):
        master.write(value)
