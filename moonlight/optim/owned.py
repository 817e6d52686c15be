"""What one rank owns of one parameter, and its state."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from moonlight.optim.master import Master
from moonlight.optim.parameters import Parameter, tensor_parallel_group
from moonlight.optim.partition import Fragment


@dataclass
class Owned:
    """Rows of one parameter that this rank owns, with their state. All tensors [rows, columns]."""

    parameter: Parameter
    fragment: Fragment
    gradient: torch.Tensor
    master: Master
    momenta: list[torch.Tensor] = field(default_factory=list)

    @property
    def counts(self) -> bool:
        """Whether this rank's copy is the one to count where each element counts once in the world."""
        if self.parameter.is_copy:
            return False
        return self.parameter.slicing != "replicated" or tensor_parallel_group(self.parameter.is_expert).rank() == 0

    @property
    def is_local(self) -> bool:
        """Whether its matrices are whole here and nobody else's business."""
        return self.parameter.slicing == "alone" and not self.fragment.is_cut

    @property
    def whole_shape(self) -> tuple[int, int]:
        """Shape of one of its matrices, tensor parallelism undone."""
        return self.parameter.whole_shape(self.fragment.matrix_rows)

    def matrices(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The matrices in a tensor of these rows."""
        return list(tensor.split(self.fragment.matrix_rows))

    def parts(self, max_elements: int) -> Iterator["Owned"]:
        """Itself, in runs of whole matrices (of rows for AdamW) of at most `max_elements`, but at least one."""
        unit = self.fragment.matrix_rows or 1
        rows = unit * max(1, max_elements // (unit * self.fragment.columns))
        for start in range(0, len(self.gradient), rows):
            yield Owned(
                self.parameter,
                self.fragment,
                self.gradient[start : start + rows],
                self.master.rows(start, start + rows),
                [momentum[start : start + rows] for momentum in self.momenta],
            )
