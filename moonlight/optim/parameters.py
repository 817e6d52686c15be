"""The parameters of this rank as the optimizer sees them: rows x columns, with a rule and a place in the whole
model."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from moonlight.model.shards import ShardedParam, local_shards, to_hf_axes, to_hf_layout
from moonlight.optim.master_weights import MasterWeight
from moonlight.placement.owners import ParamSpec, RowShard
from moonlight.placement.param_groups import ParamGroupRule, find_monitor_group, match_rules, rows_per_matrix

TensorChunk = tuple[tuple[int, ...], torch.Tensor]
"""Offset in the whole tensor, and the values there."""


@dataclass(frozen=True)
class LocalParam:
    """One parameter of this rank."""

    index: int
    key: str
    """Name in checkpoints."""
    torch_param: torch.nn.Parameter
    sharded_param: ShardedParam
    rule: ParamGroupRule
    tp_mode: str
    """How tensor parallelism treats its matrices. unsharded: each rank holds full matrices of its own; sharded: each
    rank holds a slice of every matrix; replicated: every rank holds all of them."""
    tp_dim: int
    """-2 or -1 if `tp_mode` is sharded."""

    @property
    def monitor_group(self) -> str:
        """Of those whose norms are watched."""
        return find_monitor_group(self.key)

    @property
    def is_expert(self) -> bool:
        return not getattr(self.torch_param, "allreduce", True)

    @property
    def is_shared_embedding(self) -> bool:
        """Whether the first and the last of several pipeline stages each hold a copy: tied word embeddings."""
        return getattr(self.torch_param, "shared_embedding", False)

    @property
    def is_embedding_replica(self) -> bool:
        """Whether it is the last stage's copy, which does not count where each element counts once."""
        return getattr(self.torch_param, "shared", False)

    @property
    def rows(self) -> int:
        return self.torch_param.numel() // self.columns

    @property
    def columns(self) -> int:
        return self.torch_param.shape[-1] if self.torch_param.dim() > 1 else 1

    def full_matrix_shape(self, rows: int) -> tuple[int, int]:
        """Shape of one of its matrices, of which this rank has so many rows, with tensor parallelism undone."""
        shape = [rows, self.columns]
        if self.tp_mode == "sharded":
            shape[self.tp_dim] *= tensor_parallel_group(self.is_expert).size()
        return shape[0], shape[1]

    @property
    def weight_2d(self) -> torch.Tensor:
        """The model's values [rows, columns]."""
        return self.torch_param.detach().view(self.rows, self.columns)

    @property
    def grad_2d(self) -> torch.Tensor:
        """This rank's own gradient sum [rows, columns], before the exchange with other ranks."""
        return self.torch_param.main_grad.view(self.rows, self.columns)  # type: ignore[attr-defined]

    @property
    def spec(self) -> ParamSpec:
        """What `place` needs to know of it: its rows divided into matrices for Muon, or where the pieces of a
        checkpoint meet for AdamW."""
        if is_matrix := self.rule.algorithm == "muon":
            heights = rows_per_matrix(self.rule, tuple(self.torch_param.shape))
        else:
            heights = [piece.data.numel() // self.columns for piece in local_shards(self.sharded_param)]
        assert sum(heights) == self.rows, self.key
        return ParamSpec(self.index, self.columns, tuple(heights), is_matrix, self.is_shared_embedding)

    def tensor_chunks(self, start: int, stop: int, values: torch.Tensor) -> Iterator[TensorChunk]:
        """Where the rows [start, stop) of this rank, whose `values` [stop - start, columns] are given, lie in the
        whole.

        The rectangles' tensors are views of `values`.
        """
        first = 0
        for piece in local_shards(self.sharded_param):
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
                yield to_hf_axes(whole_offset), to_hf_layout(rows)
            first = last


def _within_experts(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Cut rows of a stack [experts, rows, columns] where a rectangle must end: whole experts, or rows of one."""
    height = shape[1] if len(shape) == 3 else stop
    while start < stop:
        whole = (stop - start) // height * height if start % height == 0 else 0
        step = whole or min(stop - start, height - start % height)
        yield start, start + step
        start += step


def collect_params(state: dict[str, ShardedParam], rules: tuple[ParamGroupRule, ...]) -> list[LocalParam]:
    """Return the trained parameters of `state` (`collect_sharded_tensors` of this rank's chunks), in model order.

    Raises:
        ValueError: a parameter that no rule claims, or that two do.
    """
    trained = {key: value for key, value in state.items() if value.data.requires_grad}
    routes = match_rules(list(trained), rules)
    found = []
    for index, (key, sharded) in enumerate(trained.items()):
        tp_mode, axis = _tp_mode(sharded, routes[key])
        found.append(LocalParam(index, key, sharded.data, sharded, routes[key], tp_mode, axis))
    return found


def _tp_mode(sharded: ShardedParam, rule: ParamGroupRule) -> tuple[str, int]:
    expert = not getattr(sharded.data, "allreduce", True)
    group = tensor_parallel_group(expert)
    if group.size() == 1:
        return "unsharded", 0
    fragmentations = local_shards(sharded)[0].axis_fragmentations
    assert fragmentations is not None
    if len(fragmentations) == 1:
        return "replicated", 0
    halves = len(local_shards(sharded))  # a fused gate and up counts as two fragments even when nothing is cut
    if fragmentations[-2] > halves:
        return ("unsharded", 0) if rule.head_rows else ("sharded", -2)
    if fragmentations[-1] > 1:
        return "sharded", -1
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
class OwnedShard:
    """Rows of one parameter that this rank owns, with their state. All tensors [rows, columns]."""

    param: LocalParam
    shard: RowShard
    gradient: torch.Tensor
    master_weight: MasterWeight
    states: list[torch.Tensor] = field(default_factory=list)

    @property
    def is_primary_copy(self) -> bool:
        """Whether this rank's copy is the one to count where each element counts once in the world."""
        if self.param.is_embedding_replica:
            return False
        return self.param.tp_mode != "replicated" or tensor_parallel_group(self.param.is_expert).rank() == 0

    @property
    def is_complete(self) -> bool:
        """Whether its matrices are whole here and nobody else's business."""
        return self.param.tp_mode == "unsharded" and not self.shard.is_split

    @property
    def full_matrix_shape(self) -> tuple[int, int]:
        """Shape of one of its matrices, tensor parallelism undone."""
        return self.param.full_matrix_shape(self.shard.matrix_rows)

    def matrices(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The matrices in a tensor of these rows."""
        return list(tensor.split(self.shard.matrix_rows))

    def split(self, max_elements: int) -> Iterator["OwnedShard"]:
        """Itself, in runs of whole matrices (of rows for AdamW) of at most `max_elements`, but at least one."""
        unit = self.shard.matrix_rows or 1
        rows = unit * max(1, max_elements // (unit * self.shard.columns))
        for start in range(0, len(self.gradient), rows):
            yield OwnedShard(
                self.param,
                self.shard,
                self.gradient[start : start + rows],
                self.master_weight.rows(start, start + rows),
                [momentum[start : start + rows] for momentum in self.states],
            )
