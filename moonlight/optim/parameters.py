"""The parameters of this rank as the optimizer sees them: rows x columns, with a rule and a place in the whole
model."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from moonlight.model.shards import Sharded, pieces, turned, turned_view
from moonlight.optim.master_weights import Master
from moonlight.placement.owners import Fragment, Outline
from moonlight.placement.param_groups import Rule, group_of, matrix_heights, route

Rectangle = tuple[tuple[int, ...], torch.Tensor]
"""Offset in the whole tensor, and the values there."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of this rank."""

    index: int
    key: str
    """Name in checkpoints."""
    model: torch.nn.Parameter
    sharded: Sharded
    rule: Rule
    slicing: str
    """How tensor parallelism treats its matrices. alone: it does not (one rank, or each slice is whole matrices);
    cut: every rank has a slice of each; replicated: every rank has all."""
    cut_axis: int
    """-2 or -1 if `slicing` is cut."""

    @property
    def group(self) -> str:
        """Of those whose norms are watched."""
        return group_of(self.key)

    @property
    def is_expert(self) -> bool:
        return not getattr(self.model, "allreduce", True)

    @property
    def on_two_stages(self) -> bool:
        """Whether the first and the last of several pipeline stages each hold a copy: tied word embeddings."""
        return getattr(self.model, "shared_embedding", False)

    @property
    def is_copy(self) -> bool:
        """Whether it is the last stage's copy, which does not count where each element counts once."""
        return getattr(self.model, "shared", False)

    @property
    def rows(self) -> int:
        return self.model.numel() // self.columns

    @property
    def columns(self) -> int:
        return self.model.shape[-1] if self.model.dim() > 1 else 1

    def whole_shape(self, rows: int) -> tuple[int, int]:
        """Shape of one of its matrices, of which this rank has so many rows, with tensor parallelism undone."""
        shape = [rows, self.columns]
        if self.slicing == "cut":
            shape[self.cut_axis] *= tensor_parallel_group(self.is_expert).size()
        return shape[0], shape[1]

    @property
    def weights(self) -> torch.Tensor:
        """The model's values [rows, columns]."""
        return self.model.detach().view(self.rows, self.columns)

    @property
    def gradients(self) -> torch.Tensor:
        """This rank's own gradient sum [rows, columns], before the exchange with other ranks."""
        return self.model.main_grad.view(self.rows, self.columns)  # type: ignore[attr-defined]

    @property
    def outline(self) -> Outline:
        """What `place` needs to know of it: its rows divided into matrices for Muon, or where the pieces of a
        checkpoint meet for AdamW."""
        if is_matrix := self.rule.algorithm == "muon":
            heights = matrix_heights(self.rule, tuple(self.model.shape))
        else:
            heights = [piece.data.numel() // self.columns for piece in pieces(self.sharded)]
        assert sum(heights) == self.rows, self.key
        return Outline(self.index, self.columns, tuple(heights), is_matrix, self.on_two_stages)

    def rectangles(self, start: int, stop: int, values: torch.Tensor) -> Iterator[Rectangle]:
        """Where the rows [start, stop) of this rank, whose `values` [stop - start, columns] are given, lie in the
        whole.

        The rectangles' tensors are views of `values`.
        """
        first = 0
        for piece in pieces(self.sharded):
            shape = piece.local_shape
            last = first + piece.data.numel() // self.columns
            for low, high in _within_experts(max(start, first) - first, min(stop, last) - first, shape):
                rows = values[low + first - start : high + first - start]
                if len(shape) == 3:
                    expert, row = divmod(low, shape[1])
                    offset: tuple[int, ...] = (expert, row, 0)
                    rows = rows.view(-1, min(shape[1], high - low), shape[2])
                else:
                    offset = (low, 0)[: len(shape)]
                    rows = rows.view(-1, *shape[1:])
                whole_offset = [a + b for a, b in zip(piece.global_offset, offset, strict=True)]
                yield turned(whole_offset), turned_view(rows)
            first = last


def _within_experts(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Cut rows of a stack [experts, rows, columns] where a rectangle must end: whole experts, or rows of one."""
    height = shape[1] if len(shape) == 3 else stop
    while start < stop:
        whole = (stop - start) // height * height if start % height == 0 else 0
        step = whole or min(stop - start, height - start % height)
        yield start, start + step
        start += step


def find_parameters(state: dict[str, Sharded], rules: tuple[Rule, ...]) -> list[Parameter]:
    """The parameters that are trained of `state` (`sharded_state` of this rank's chunks), in the model's order.

    Raises:
        ValueError: a parameter that no rule claims, or that two do.
    """
    trained = {key: value for key, value in state.items() if value.data.requires_grad}
    routes = route(list(trained), rules)
    found = []
    for index, (key, sharded) in enumerate(trained.items()):
        slicing, axis = _slicing(sharded, routes[key])
        found.append(Parameter(index, key, sharded.data, sharded, routes[key], slicing, axis))
    return found


def _slicing(sharded: Sharded, rule: Rule) -> tuple[str, int]:
    expert = not getattr(sharded.data, "allreduce", True)
    group = tensor_parallel_group(expert)
    if group.size() == 1:
        return "alone", 0
    fragmentations = pieces(sharded)[0].axis_fragmentations
    assert fragmentations is not None
    if len(fragmentations) == 1:
        return "replicated", 0
    halves = len(pieces(sharded))  # a fused gate and up counts as two fragments even when nothing is cut
    if fragmentations[-2] > halves:
        return ("alone", 0) if rule.head_rows else ("cut", -2)
    if fragmentations[-1] > 1:
        return "cut", -1
    return "replicated", 0


def tensor_parallel_group(expert: bool) -> dist.ProcessGroup:
    """The ranks that hold the slices of one matrix."""
    if expert:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def embedding_group() -> dist.ProcessGroup:
    """The two ranks, of the first and the last pipeline stage, that hold the same rows of tied word embeddings."""
    return parallel_state.get_embedding_group()


def data_parallel_group(expert: bool) -> dist.ProcessGroup:
    """The ranks that hold the same parameters for different data."""
    if expert:
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


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
