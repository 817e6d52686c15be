"""SVD entropy of the weights: how evenly a matrix uses its directions (arXiv 2502.16982, 3.4).

With singular values s_1 .. s_n and p_i = s_i^2 / sum s^2, H = - sum p_i log p_i / log n. H is 1 if all singular values
are equal, and 0 if all but one are 0. A matrix is a matrix of the Hugging Face model. Of each layer's routed experts,
SAMPLED_EXPERTS are measured.
"""

import math
from collections.abc import Iterator, Sequence

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import torch
import torch.distributed as dist

from moonlight.model.shards import local_shards
from moonlight.optim.parameters import LocalParam, data_parallel_group, tensor_parallel_group
from moonlight.placement.param_groups import MATRIX_GROUPS

SAMPLED_EXPERTS = 3
"""Experts measured in each layer: 3, as in the paper (of 64)."""


def svd_entropy(matrix: torch.Tensor) -> float:
    """Return the SVD entropy of a matrix [rows, columns], from the eigenvalues of its float64 Gram matrix.

    NaN if the matrix is zero or not finite, or if its short side is 1.
    """
    values = matrix.double()
    gram = values @ values.mT if len(values) <= values.shape[1] else values.mT @ values
    if len(gram) < 2 or not gram.isfinite().all() or not gram.any():
        return math.nan
    squares = torch.linalg.eigvalsh(gram).clamp(min=0)
    fractions = squares / squares.sum()
    return -torch.xlogy(fractions, fractions).sum().item() / math.log(len(gram))


@torch.no_grad()
def mean_svd_entropies(parameters: Sequence[LocalParam], num_experts: int) -> dict[str, float]:
    """Return the mean SVD entropy of the matrices of each of MATRIX_GROUPS, over all layers. Collective.

    It measures the model's weights in their dtype; they must be up to date. Ranks that hold the same matrices divide
    the work: each matrix is measured once in the job. Groups without matrices are left out.
    """
    device = torch.cuda.current_device()
    sums = torch.zeros(len(MATRIX_GROUPS), 2, dtype=torch.float64, device=device)
    counts = {False: 0, True: 0}
    for parameter, matrix, tp_dim in _slices(parameters, num_experts):
        is_expert = parameter.is_expert
        dp_group, tp_group = data_parallel_group(is_expert), tensor_parallel_group(is_expert)
        counts[is_expert] += 1
        dp_rank, tp_rank = divmod(counts[is_expert] % (dp_group.size() * tp_group.size()), tp_group.size())
        if dp_group.rank() != dp_rank:
            continue
        if tp_dim:
            slices = [torch.empty_like(matrix, memory_format=torch.contiguous_format) for _ in range(tp_group.size())]
            dist.all_gather(slices, matrix.contiguous(), group=tp_group)
            matrix = torch.cat(slices, dim=tp_dim)
        if tp_group.rank() == tp_rank:
            sums[MATRIX_GROUPS.index(parameter.monitor_group)] += sums.new_tensor([svd_entropy(matrix), 1.0])
    dist.all_reduce(sums)
    return {name: total / count for name, (total, count) in zip(MATRIX_GROUPS, sums.tolist(), strict=True) if count}


def _slices(parameters: Sequence[LocalParam], num_experts: int) -> Iterator[tuple[LocalParam, torch.Tensor, int]]:
    """Yield (parameter, this rank's slice, sharded dimension) of every measured matrix.

    The order is the same on all ranks that hold these matrices. The dimension is -2 or -1 if tensor parallelism shards
    the matrix, otherwise 0.
    """
    sampled = {index * num_experts // SAMPLED_EXPERTS for index in range(SAMPLED_EXPERTS)}
    for parameter in parameters:
        if parameter.monitor_group not in MATRIX_GROUPS:
            continue
        shards = local_shards(parameter.sharded_param)  # gate and up are two
        for shard in shards:
            local, full = shard.local_shape, shard.global_shape
            tp_dim = next((dim for dim in (-2, -1) if local[dim] * (len(shards) if dim == -2 else 1) != full[dim]), 0)
            stack = shard.data if len(local) == 3 else shard.data.unsqueeze(0)
            for index, matrix in enumerate(stack):
                if len(local) == 2 or shard.global_offset[0] + index in sampled:
                    yield parameter, matrix, tp_dim
