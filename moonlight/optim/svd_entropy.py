"""SVD entropy of the weights: how evenly a matrix uses its directions (arXiv 2502.16982, 3.4).

With singular values s_1 .. s_n and p_i = s_i^2 / sum s^2, H = - sum p_i log p_i / log n: 1 where all are equal, 0
where one is everything. One matrix is what the Hugging Face model calls one; of a layer's routed experts, three are
taken.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import torch
import torch.distributed as dist

from moonlight.model.shards import local_shards
from moonlight.optim.parameters import LocalParam, data_parallel_group, tensor_parallel_group
from moonlight.placement.param_groups import MATRIX_GROUPS

SAMPLED_EXPERTS = 3
"""Of each layer, as many as the paper takes of 64."""


def svd_entropy(matrix: torch.Tensor) -> float:
    """SVD entropy of a matrix [rows, columns], from the eigenvalues of its float64 Gram matrix; NaN if it has none."""
    values = matrix.double()
    gram = values @ values.mT if len(values) <= values.shape[1] else values.mT @ values
    if len(gram) < 2 or not gram.isfinite().all() or not gram.any():
        return math.nan
    squares = torch.linalg.eigvalsh(gram).clamp(min=0)
    shares = squares / squares.sum()
    return -torch.xlogy(shares, shares).sum().item() / math.log(len(gram))


@dataclass(frozen=True)
class _Slice:
    """What this rank has of one matrix."""

    monitor_group: str
    is_expert: bool
    values: torch.Tensor
    tp_dim: int
    """-2 or -1 if tensor parallelism cuts the matrix, else 0."""


@torch.no_grad()
def mean_svd_entropies(parameters: Sequence[LocalParam], num_experts: int) -> dict[str, float]:
    """Mean SVD entropy of the matrices of each of MATRIX_GROUPS, over all layers.

    It is that of the model's weights, in their dtype; they must be up to date.

    Every rank calls it. Ranks that hold the same matrices share the work, and every matrix is taken once in the world.
    """
    device = torch.cuda.current_device()
    sums = torch.zeros(len(MATRIX_GROUPS), 2, dtype=torch.float64, device=device)
    turn = {False: 0, True: 0}
    for part in _slices(parameters, num_experts):
        own, slices = data_parallel_group(part.is_expert), tensor_parallel_group(part.is_expert)
        turn[part.is_expert] += 1
        data_rank, tensor_rank = divmod(turn[part.is_expert] % (own.size() * slices.size()), slices.size())
        if own.rank() != data_rank:
            continue
        matrix = part.values
        if part.tp_dim:
            others = [torch.empty_like(matrix, memory_format=torch.contiguous_format) for _ in range(slices.size())]
            dist.all_gather(others, matrix.contiguous(), group=slices)
            matrix = torch.cat(others, dim=part.tp_dim)
        if slices.rank() == tensor_rank:
            sums[MATRIX_GROUPS.index(part.monitor_group)] += sums.new_tensor([svd_entropy(matrix), 1.0])
    dist.all_reduce(sums)
    return {name: total / count for name, (total, count) in zip(MATRIX_GROUPS, sums.tolist(), strict=True) if count}


def _slices(parameters: Sequence[LocalParam], num_experts: int) -> Iterator[_Slice]:
    """Of every matrix that is taken, in an order equal on all ranks that hold the same ones."""
    sampled = {number * num_experts // SAMPLED_EXPERTS for number in range(SAMPLED_EXPERTS)}
    for parameter in parameters:
        if parameter.monitor_group not in MATRIX_GROUPS:
            continue
        parts = local_shards(parameter.sharded_param)  # gate and up apart
        for piece in parts:
            local, whole = piece.local_shape, piece.global_shape
            cut_axis = next((a for a in (-2, -1) if local[a] * (len(parts) if a == -2 else 1) != whole[a]), 0)
            stack = piece.data if len(local) == 3 else piece.data.unsqueeze(0)
            for index, matrix in enumerate(stack):
                if len(local) == 2 or piece.global_offset[0] + index in sampled:
                    yield _Slice(parameter.monitor_group, parameter.is_expert, matrix, cut_axis)
