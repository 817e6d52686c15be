"""Costs of owning rows, for each rank: optimizer state, communication and its buffers, Newton-Schulz.

The optimizer uses the same owner ranks (`placement/owners.py`). `moonlight plan --dry-run` counts these costs on the
real model and optimizer.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from moonlight.config.run import RunConfig
from moonlight.placement.comm_bytes import (
    GRADIENT_BYTES,
    CommBytes,
    OptimizerCost,
    direction_bytes,
    gradient_bytes,
    master_bytes,
    momentum_bytes,
    muon_costs,
    weight_bytes,
    zero1_cost,
)
from moonlight.placement.owners import (
    MAX_IN_FLIGHT,
    RowShard,
    balance_by_cost,
    comm_rounds,
    make_buckets,
    newton_schulz_cost,
    place_params,
    round_limit,
)
from moonlight.plan.cut import PlannedParam
from moonlight.plan.update import Matrices, update_bytes


@dataclass
class GroupRankCost:
    """Costs of one rank for dense or for expert parameters, in bytes unless noted."""

    optimizer_cost: OptimizerCost = field(default_factory=OptimizerCost)
    slices: CommBytes = field(default_factory=CommBytes)
    """Slices of matrices to tensor-parallel peers and back, and gradients that these peers sum."""
    gradient_shards: float = 0
    gradient_buffers: float = 0
    """Maximum of gradients in flight."""
    weight_buffers: float = 0
    """Maximum of weights in flight."""
    first_weights: float = 0
    """Buffers of the weights that the rank sends immediately after their update."""
    update: float = 0
    """Maximum that the update of its rows needs in addition to the state."""
    newton_schulz_flops: float = 0
    """FLOPs of a step."""


@dataclass(frozen=True)
class RankCost:
    """Costs of one rank, for its dense and for its expert parameters."""

    dense: GroupRankCost
    expert: GroupRankCost

    @property
    def optimizer_cost(self) -> OptimizerCost:
        """Sum for dense and expert parameters, without the slices for tensor-parallel peers."""
        return self.dense.optimizer_cost + self.expert.optimizer_cost

    @property
    def newton_schulz_flops(self) -> float:
        return self.dense.newton_schulz_flops + self.expert.newton_schulz_flops

    @property
    def gradient_shards(self) -> float:
        return self.dense.gradient_shards + self.expert.gradient_shards

    @property
    def exchange_buffers(self) -> float:
        """Bytes of gradient buffers in the backward pass or weight buffers in the forward pass, the larger."""
        return max(
            self.dense.gradient_buffers + self.expert.gradient_buffers,
            self.dense.weight_buffers + self.expert.weight_buffers,
        )

    @property
    def update(self) -> float:
        """Bytes that the update needs: it runs one part after the other, then sends the first weights."""
        return max(self.dense.update, self.expert.update, self.dense.first_weights + self.expert.first_weights)


def largest(costs: Sequence[GroupRankCost]) -> GroupRankCost:
    """Return the maximum over ranks of each communication cost and of Newton-Schulz; other costs are 0."""

    def larger(comm_bytes: list[CommBytes]) -> CommBytes:
        return CommBytes(max(value.sent for value in comm_bytes), max(value.received for value in comm_bytes))

    return GroupRankCost(
        OptimizerCost(
            larger([cost.optimizer_cost.gradients for cost in costs]),
            larger([cost.optimizer_cost.matrices for cost in costs]),
            larger([cost.optimizer_cost.weights for cost in costs]),
        ),
        larger([cost.slices for cost in costs]),
        newton_schulz_flops=max(cost.newton_schulz_flops for cost in costs),
    )


@dataclass
class GroupCosts:
    """Costs in one data-parallel group, for each of its ranks and each of their tensor-parallel peers."""

    ranks: list[list[GroupRankCost]]
    """`[data-parallel rank][tensor-parallel rank]`."""
    owners: dict[int, set[int]]
    """Parameter index -> data-parallel ranks that own rows of it."""


def group_costs(parameters: Sequence[PlannedParam], num_ranks: int, num_slices: int, config: RunConfig) -> GroupCosts:
    """Compute the costs of every rank of a data-parallel group of `num_ranks`, from the exact row owners.

    `num_slices` tensor-parallel ranks split each matrix.
    """
    if not parameters:
        return GroupCosts([[GroupRankCost() for _ in range(num_slices)] for _ in range(num_ranks)], {})
    by_index = {parameter.spec.index: parameter for parameter in parameters}
    buckets = place_params([parameter.spec for parameter in parameters], num_ranks, config.parallel.bucket_size)
    shards = [shard for _, bucket_shards in buckets for shard in bucket_shards]
    owners: dict[int, set[int]] = {}
    owned: list[list[RowShard]] = [[] for _ in range(num_ranks)]
    homed: list[list[RowShard]] = [[] for _ in range(num_ranks)]
    for shard in shards:
        owners.setdefault(shard.param_index, set()).add(shard.owner_rank)
        owned[shard.owner_rank].append(shard)
        if shard.is_split and shard.start == shard.matrix_start:
            homed[shard.home_rank].append(shard)
    shared_embeddings = [p.spec.index for p in parameters if p.spec.is_shared_embedding]
    optimizer_costs = muon_costs(shards, num_ranks, config, shared_embeddings)
    if num_ranks > 1:
        gradients, weights, first = _buffers([_owned_sizes(part, num_ranks) for _, part in buckets], config)
    else:
        gradients, weights, first = [0.0], [0.0], [0.0]
    ranks = []
    for rank, optimizer_cost in enumerate(optimizer_costs):
        gradient_shards = sum(shard.numel for shard in owned[rank]) * GRADIENT_BYTES if num_ranks > 1 else 0
        matrices = _matrices(owned[rank], homed[rank], by_index, num_slices, config)
        ranks.append(
            [
                GroupRankCost(
                    optimizer_cost,
                    slices,
                    gradient_shards,
                    gradients[rank],
                    weights[rank],
                    first[rank],
                    update_bytes(work, config),
                    work.flops(config),
                )
                for slices, work in matrices
            ]
        )
    return GroupCosts(ranks, owners)


def mean_group_cost(
    parameters: Sequence[PlannedParam], num_ranks: int, num_slices: int, config: RunConfig
) -> GroupRankCost:
    """Compute the mean costs of a rank, without assigning owners: close to `group_costs`, and much faster."""
    specs = [parameter.spec for parameter in parameters]
    numel, muon = sum(spec.numel for spec in specs), sum(spec.numel for spec in specs if spec.is_matrix)
    shared = sum(spec.numel for spec in specs if spec.is_shared_embedding)
    optimizer_cost = zero1_cost(numel, num_ranks, config, shared)
    optimizer_cost.masters = numel * master_bytes(config) / num_ranks
    optimizer_cost.momenta = (muon * momentum_bytes(config) + (numel - muon) * 8) / num_ranks
    sliced = sum(p.numel for p in parameters if p.tp_mode != "unsharded" and p.spec.is_matrix) / num_ranks
    slice_bytes = 2 * sliced * direction_bytes(config) * (num_slices - 1) / num_slices
    work = Matrices()
    for parameter in parameters:
        if parameter.spec.is_matrix:
            for rows, count in Counter(parameter.spec.block_rows).items():
                shape = _full_shape(parameter, rows, num_slices)
                count_per_rank = count / num_ranks / (num_slices if parameter.tp_mode != "unsharded" else 1)
                work.add(shape, count_per_rank, is_local=parameter.tp_mode == "unsharded")
    sizes = []
    for bucket in make_buckets(specs, num_ranks, config.parallel.bucket_size):
        total = sum(spec.numel for spec in bucket)
        limit = round_limit(total, num_ranks) * num_ranks
        sizes += [min(limit, total - start) for start in range(0, total, limit)]
    in_flight = max((sum(sizes[i : i + MAX_IN_FLIGHT]) for i in range(len(sizes))), default=0) if num_ranks > 1 else 0
    work.sharded_elements = sliced
    work.adamw_elements = (numel - muon) / num_ranks
    return GroupRankCost(
        optimizer_cost,
        CommBytes(slice_bytes, slice_bytes),
        numel * GRADIENT_BYTES / num_ranks if num_ranks > 1 else 0,
        2 * in_flight * gradient_bytes(config),
        2 * in_flight * weight_bytes(config),
        2 * sum(sizes[-MAX_IN_FLIGHT:]) * weight_bytes(config) if num_ranks > 1 else 0,
        update_bytes(work, config),
        work.flops(config),
    )


def _full_shape(parameter: PlannedParam, rows: int, num_slices: int) -> tuple[int, int]:
    """Return the shape of a matrix that has `rows` rows on this rank, before tensor parallelism splits it."""
    shape = [rows, parameter.spec.columns]
    if parameter.tp_mode == "sharded":
        shape[parameter.tp_dim] *= num_slices
    return shape[0], shape[1]


def _owned_sizes(shards: Iterable[RowShard], num_ranks: int) -> list[int]:
    """Return the number of elements that each rank owns."""
    sizes = [0] * num_ranks
    for shard in shards:
        sizes[shard.owner_rank] += shard.numel
    return sizes


def _buffers(bucket_sizes: Sequence[Sequence[int]], config: RunConfig) -> list[list[float]]:
    """Return bytes of [gradient buffers, weight buffers, buffers of the first weight rounds], each by rank.

    The first two are maxima over MAX_IN_FLIGHT consecutive rounds. A gradient round sends all rows and receives the
    rank's rows from every rank. A weight round sends the rank's rows to every other rank and receives all other rows.
    """
    num_ranks = len(bucket_sizes[0])
    by_bucket = [[sizes for _, sizes in comm_rounds(bucket)] for bucket in bucket_sizes]
    backward_order = [sizes for bucket in by_bucket for sizes in bucket]
    forward_order = [sizes for bucket in reversed(by_bucket) for sizes in bucket]
    gradients, weights, first = ([0.0] * num_ranks for _ in range(3))
    for order, maxima, element, copies in (
        (backward_order, gradients, gradient_bytes(config), num_ranks),
        (forward_order, weights, weight_bytes(config), num_ranks - 2),
    ):
        totals = [sum(sizes) for sizes in order]
        for rank in range(num_ranks):
            round_bytes = [element * (t + copies * s[rank]) for t, s in zip(totals, order, strict=True)]
            maxima[rank] = max(sum(round_bytes[i : i + MAX_IN_FLIGHT]) for i in range(len(round_bytes)))
            first[rank] = sum(round_bytes[:MAX_IN_FLIGHT])
    return [gradients, weights, first]


def _matrices(
    owned: Sequence[RowShard],
    homed: Sequence[RowShard],
    by_index: dict[int, PlannedParam],
    num_slices: int,
    config: RunConfig,
) -> list[tuple[CommBytes, Matrices]]:
    """Return the slice bytes and the matrices of each tensor-parallel peer of a data-parallel rank.

    `homed` holds the first shard of each split matrix that this rank gathers. Peers divide their matrices in the order
    of `optim/matrix_exchange.py`.
    """
    work = [Matrices() for _ in range(num_slices)]
    sliced: list[tuple[PlannedParam, tuple[int, int]]] = []

    def add(parameter: PlannedParam, rows: int, count: int, *, is_local: bool) -> None:
        shape = _full_shape(parameter, rows, num_slices)
        if parameter.tp_mode != "unsharded":
            sliced.extend([(parameter, shape)] * count)
            return
        for peer_work in work:
            peer_work.add(shape, count, is_local=is_local)

    for shard in sorted(homed, key=lambda shard: (shard.param_index, shard.start)):
        add(by_index[shard.param_index], shard.matrix_rows, 1, is_local=False)
    replicated = 0
    for shard in sorted(owned, key=lambda shard: (shard.param_index, shard.start)):
        parameter = by_index[shard.param_index]
        if parameter.tp_mode == "replicated":
            replicated += shard.numel
        if not shard.matrix_rows:
            for peer_work in work:
                peer_work.adamw_elements += shard.numel
            continue
        if shard.is_split or parameter.tp_mode != "unsharded":
            for peer_work in work:
                peer_work.sharded_elements += shard.numel
        if not shard.is_split:
            add(parameter, shard.matrix_rows, (shard.stop - shard.start) // shard.matrix_rows, is_local=True)
    num_peers = num_slices - 1
    sent, received = [[0.0] * num_slices for _ in range(2)]
    element = direction_bytes(config)
    owners = balance_by_cost([newton_schulz_cost(*shape) for _, shape in sliced], num_slices)
    for (parameter, shape), owner in zip(sliced, owners, strict=True):
        numel = shape[0] * shape[1]
        work[owner].add(shape, 1, is_local=False)
        is_sharded = parameter.tp_mode == "sharded"
        part = numel / num_slices if is_sharded else numel
        for rank in range(num_slices):
            if rank == owner:  # gathers the slices and scatters the results
                sent[rank] += num_peers * part * element
                received[rank] += num_peers * part * element if is_sharded else 0
            else:
                sent[rank] += part * element if is_sharded else 0
                received[rank] += part * element
    ring = 2 * num_peers / num_slices * replicated * GRADIENT_BYTES
    return [(CommBytes(sent[t] + ring, received[t] + ring), work[t]) for t in range(num_slices)]
