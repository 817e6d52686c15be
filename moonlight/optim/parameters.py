"""Parameters as the optimizer sees them: 2-D views [rows, columns], each with its rule and its sharding.

`LocalParam` is one parameter of this rank's model. `OwnedShard` is the rows of a parameter that this rank owns, with
their gradient sum, master weights and optimizer state.
"""

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
"""Offset in the global tensor, and the values there."""


@dataclass(frozen=True)
class LocalParam:
    """One parameter of this rank."""

    index: int
    """Position in model order."""
    key: str
    """Name in checkpoints."""
    torch_param: torch.nn.Parameter
    sharded_param: ShardedParam
    rule: ParamGroupRule
    tp_mode: str
    """How tensor parallelism shards its matrices. unsharded: each rank holds full matrices that no peer holds, or there
    is no tensor parallelism; sharded: each rank holds a slice of every matrix; replicated: every rank holds all of
    them."""
    tp_dim: int
    """-2 or -1 if `tp_mode` is sharded."""

    @property
    def monitor_group(self) -> str:
        """The group of MONITOR_GROUPS that its norms count towards."""
        return find_monitor_group(self.key)

    @property
    def is_expert(self) -> bool:
        return not getattr(self.torch_param, "allreduce", True)

    @property
    def is_shared_embedding(self) -> bool:
        """True if the first and the last of several pipeline stages each hold a copy: tied word embeddings."""
        return getattr(self.torch_param, "shared_embedding", False)

    @property
    def is_embedding_replica(self) -> bool:
        """True for the last stage's copy, which sums over all elements of the model skip."""
        return getattr(self.torch_param, "shared", False)

    @property
    def rows(self) -> int:
        return self.torch_param.numel() // self.columns

    @property
    def columns(self) -> int:
        return self.torch_param.shape[-1] if self.torch_param.dim() > 1 else 1

    def full_matrix_shape(self, rows: int) -> tuple[int, int]:
        """Return the shape, before tensor parallelism, of a matrix of which this rank has `rows` rows."""
        shape = [rows, self.columns]
        if self.tp_mode == "sharded":
            shape[self.tp_dim] *= tensor_parallel_group(self.is_expert).size()
        return shape[0], shape[1]

    @property
    def weight_2d(self) -> torch.Tensor:
        """The model's weights, a view [rows, columns]."""
        return self.torch_param.detach().view(self.rows, self.columns)

    @property
    def grad_2d(self) -> torch.Tensor:
        """This rank's gradient sum before the reduce-scatter, a view [rows, columns]."""
        return self.torch_param.main_grad.view(self.rows, self.columns)  # type: ignore[attr-defined]

    @property
    def spec(self) -> ParamSpec:
        """Its rows as `place_params` takes them: one block per matrix for Muon, one per checkpoint tensor for AdamW."""
        if is_matrix := self.rule.algorithm == "muon":
            block_rows = rows_per_matrix(self.rule, tuple(self.torch_param.shape))
        else:
            block_rows = [shard.data.numel() // self.columns for shard in local_shards(self.sharded_param)]
        assert sum(block_rows) == self.rows, self.key
        return ParamSpec(self.index, self.columns, tuple(block_rows), is_matrix, self.is_shared_embedding)

    def tensor_chunks(self, start: int, stop: int, values: torch.Tensor) -> Iterator[TensorChunk]:
        """Yield the rows [start, stop) of this rank as chunks of the global tensor, in Hugging Face layout.

        `values` [stop - start, columns] holds these rows; the tensors of the chunks are views of it.
        """
        shard_start = 0
        for shard in local_shards(self.sharded_param):
            shape = shard.local_shape
            shard_stop = shard_start + shard.data.numel() // self.columns
            first, last = max(start, shard_start) - shard_start, min(stop, shard_stop) - shard_start
            for chunk_start, chunk_stop in _split_at_experts(first, last, shape):
                rows = values[chunk_start + shard_start - start : chunk_stop + shard_start - start]
                if len(shape) == 3:
                    expert, row = divmod(chunk_start, shape[1])
                    offset: tuple[int, ...] = (expert, row, 0)
                    rows = rows.view(-1, min(shape[1], chunk_stop - chunk_start), shape[2])
                else:
                    offset = (chunk_start, 0)[: len(shape)]
                    rows = rows.view(-1, *shape[1:])
                global_offset = [a + b for a, b in zip(shard.global_offset, offset, strict=True)]
                yield to_hf_axes(global_offset), to_hf_layout(rows)
            shard_start = shard_stop


def _split_at_experts(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Split rows of a stack [experts, rows, columns] into boxes: several full experts, or rows of one expert."""
    height = shape[1] if len(shape) == 3 else stop
    while start < stop:
        full_experts = (stop - start) // height * height if start % height == 0 else 0
        step = full_experts or min(stop - start, height - start % height)
        yield start, start + step
        start += step


def collect_params(state: dict[str, ShardedParam], rules: tuple[ParamGroupRule, ...]) -> list[LocalParam]:
    """Return the trained parameters of `state` (`collect_sharded_tensors` of this rank's chunks), in model order.

    Raises:
        ValueError: no rule claims a parameter, or two rules do.
    """
    trained = {key: value for key, value in state.items() if value.data.requires_grad}
    rule_of = match_rules(list(trained), rules)
    params = []
    for index, (key, sharded) in enumerate(trained.items()):
        tp_mode, tp_dim = _tp_mode(sharded, rule_of[key])
        params.append(LocalParam(index, key, sharded.data, sharded, rule_of[key], tp_mode, tp_dim))
    return params


def _tp_mode(sharded: ShardedParam, rule: ParamGroupRule) -> tuple[str, int]:
    """Return `tp_mode` and `tp_dim` of a parameter."""
    is_expert = not getattr(sharded.data, "allreduce", True)
    group = tensor_parallel_group(is_expert)
    if group.size() == 1:
        return "unsharded", 0
    fragmentations = local_shards(sharded)[0].axis_fragmentations
    assert fragmentations is not None
    if len(fragmentations) == 1:
        return "replicated", 0
    num_fused = len(local_shards(sharded))  # a fused gate and up counts as two fragments even if it is not sharded
    if fragmentations[-2] > num_fused:
        return ("unsharded", 0) if rule.head_rows else ("sharded", -2)
    if fragmentations[-1] > 1:
        return "sharded", -1
    return "replicated", 0


def tensor_parallel_group(expert: bool) -> dist.ProcessGroup:
    """Return the group of ranks that hold the slices of one matrix; `expert`: of the routed experts' matrices."""
    if expert:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def embedding_group() -> dist.ProcessGroup:
    """Return the two ranks, of the first and the last pipeline stage, with the same rows of tied word embeddings."""
    return parallel_state.get_embedding_group()


def data_parallel_group(expert: bool) -> dist.ProcessGroup:
    """Return the group of ranks that hold the same parameters for different data; `expert`: of the routed experts."""
    if expert:
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


@dataclass
class OwnedShard:
    """Rows of one parameter that this rank owns, with their state. All tensors are [rows, columns]."""

    param: LocalParam
    shard: RowShard
    grad: torch.Tensor
    """Sum over all ranks, after `ShardedDataParallel.finish_grad_sync`."""
    master_weight: MasterWeight
    states: list[torch.Tensor] = field(default_factory=list)
    """Muon: the momentum. AdamW: both moments."""

    @property
    def is_primary_copy(self) -> bool:
        """True if sums over all elements of the model count this rank's copy."""
        if self.param.is_embedding_replica:
            return False
        return self.param.tp_mode != "replicated" or tensor_parallel_group(self.param.is_expert).rank() == 0

    @property
    def is_complete(self) -> bool:
        """True if this rank holds each matrix in full, and no other rank orthogonalizes it."""
        return self.param.tp_mode == "unsharded" and not self.shard.is_split

    @property
    def full_matrix_shape(self) -> tuple[int, int]:
        """Shape of one of its matrices before tensor parallelism."""
        return self.param.full_matrix_shape(self.shard.matrix_rows)

    def matrices(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Split a tensor of these rows into its matrices, as views."""
        return list(tensor.split(self.shard.matrix_rows))

    def split(self, max_elements: int) -> Iterator["OwnedShard"]:
        """Yield parts of full matrices (of rows for AdamW), each of at most `max_elements` or one matrix (row)."""
        unit = self.shard.matrix_rows or 1
        rows = unit * max(1, max_elements // (unit * self.shard.columns))
        for start in range(0, len(self.grad), rows):
            yield OwnedShard(
                self.param,
                self.shard,
                self.grad[start : start + rows],
                self.master_weight.rows(start, start + rows),
                [state[start : start + rows] for state in self.states],
            )
