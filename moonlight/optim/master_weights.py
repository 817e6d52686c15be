"""Master weights: what the optimizer updates, of which the model holds a copy in its own precision.

A float32 model is its own master. For a bfloat16 model the master is a float32 tensor, or, split, the model's bfloat16
weight and the 16 bits by which the master differs from it: the same values in half the memory.
"""

from collections.abc import Sequence

import torch

from moonlight.optim.update_rules import apply_updates, can_fuse

_HALF = 0x8000


def round_to_bfloat16(master: torch.Tensor) -> torch.Tensor:
    """The nearest bfloat16 of each float32, ties away from zero.

    Ties go one way, unlike in torch's own rounding to even, because then exactly 2^16 floats round to each bfloat16 and
    16 bits tell them apart.
    """
    return ((master.view(torch.int32) + _HALF) >> 16).to(torch.int16).view(torch.bfloat16)


def low_bits(master: torch.Tensor) -> torch.Tensor:
    """What `round_to_bfloat16` leaves out, int16: the difference of the bit patterns."""
    return (((master.view(torch.int32) + _HALF) & 0xFFFF) - _HALF).to(torch.int16)


def join_halves(rounded: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The float32 master of a bfloat16 weight and its remainder; exact."""
    return ((rounded.view(torch.int16).to(torch.int32) << 16) + remainder).view(torch.float32)


class MasterWeight:
    """The master weights of some rows of a parameter. `weights` is the model's own view of them [rows, columns]."""

    def __init__(self, weights: torch.Tensor, kind: str) -> None:
        """Starts from the model's weights; `kind` is float32 or split."""
        self.weights = weights
        self._full = self._remainder = None
        if weights.dtype is torch.bfloat16 and kind == "split":
            self._remainder = torch.zeros_like(weights, dtype=torch.int16)
        elif weights.dtype is torch.bfloat16:
            self._full = weights.float()

    def to_float32(self) -> torch.Tensor:
        """float32 [rows, columns]: to be changed only between this call and `store`."""
        if self._remainder is not None:
            return join_halves(self.weights, self._remainder)
        return self.weights if self._full is None else self._full

    def to_float32_on_host(self) -> torch.Tensor:
        """`values`, or a copy of them in host memory where they are made for the call: all of a model may be there."""
        return self.to_float32() if self._remainder is None else self.to_float32().cpu()

    def to_meta(self) -> torch.Tensor:
        """`values`, or a meta tensor of their shape where they would have to be made."""
        return self.to_float32() if self._remainder is None else self.weights.to("meta", torch.float32)

    def write(self, values: torch.Tensor) -> None:
        """Keep changed `values` or `draft`, and round them into the model."""
        values = values.to(self.weights.device)
        if self._remainder is not None:
            self._remainder.copy_(low_bits(values))
        if self.weights.dtype is torch.bfloat16:
            self.weights.copy_(round_to_bfloat16(values))

    def rows(self, start: int, stop: int) -> "MasterWeight":
        """The same master, restricted to some of its rows."""
        part = object.__new__(MasterWeight)
        part.weights = self.weights[start:stop]
        part._full = None if self._full is None else self._full[start:stop]
        part._remainder = None if self._remainder is None else self._remainder[start:stop]
        return part

    def state_bytes(self) -> int:
        """Memory beyond the model's own weights."""
        return sum(t.numel() * t.element_size() for t in (self._full, self._remainder) if t is not None)


def apply_update(
    masters: Sequence[MasterWeight],
    updates: Sequence[torch.Tensor],
    factors: Sequence[float],
    *,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """W <- W - lr (factor U + wd W) for each master, rounded into the model; in one pass on a GPU."""
    if all(master.weights.is_meta for master in masters):
        return  # that pass makes nothing
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
