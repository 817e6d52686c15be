"""What owning rows costs each rank: state, bytes of the exchange and of its buffers, Newton-Schulz.

The owners are the optimizer's own (`optim/placement.py`). `moonlight plan --dry-run` counts the same on the real thing.
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
    """What one rank holds and sends of one lane (dense or expert parameters), or of both; in bytes unless said."""

    share: OptimizerCost = field(default_factory=OptimizerCost)
    slices: CommBytes = field(default_factory=CommBytes)
    """Slices of matrices to tensor-parallel peers and back, and gradients that those add up."""
    gradient_shards: float = 0
    gradient_buffers: float = 0
    """Most of gradients under way at once."""
    weight_buffers: float = 0
    first_weights: float = 0
    """Of weights that leave as soon as they are new."""
    update: float = 0
    """Most that the update of its rows needs besides the state."""
    newton_schulz_flops: float = 0


@dataclass(frozen=True)
class RankCost:
    """One rank: its dense and its expert lane."""

    dense: GroupRankCost
    expert: GroupRankCost

    @property
    def share(self) -> OptimizerCost:
        """Of both lanes, slices with tensor-parallel peers apart."""
        return self.dense.share + self.expert.share

    @property
    def newton_schulz_flops(self) -> float:
        return self.dense.newton_schulz_flops + self.expert.newton_schulz_flops

    @property
    def gradient_shards(self) -> float:
        return self.dense.gradient_shards + self.expert.gradient_shards

    @property
    def exchange_buffers(self) -> float:
        """Gradients of both lanes in the backward pass, or weights of both in the forward pass."""
        return max(
            self.dense.gradient_buffers + self.expert.gradient_buffers,
            self.dense.weight_buffers + self.expert.weight_buffers,
        )

    @property
    def update(self) -> float:
        """Most that the update needs: one part after the other, and at its end the first weights leave."""
        return max(self.dense.update, self.expert.update, self.dense.first_weights + self.expert.first_weights)


def largest(held: Sequence[GroupRankCost]) -> GroupRankCost:
    """The largest of each figure of the exchange, and of Newton-Schulz, over some ranks."""

    def flow(flows: Iterable[CommBytes]) -> CommBytes:
        both = list(flows)
        return CommBytes(max(f.sent for f in both), max(f.received for f in both))

    share = OptimizerCost(
        flow(h.share.gradients for h in held), flow(h.share.matrices for h in held), flow(h.share.weights for h in held)
    )
    return GroupRankCost(
        share, flow(h.slices for h in held), newton_schulz_flops=max(h.newton_schulz_flops for h in held)
    )


@dataclass
class GroupCosts:
    """One group of data-parallel ranks, and the tensor-parallel peers of each."""

    ranks: list[list[GroupRankCost]]
    """`[data-parallel rank][tensor-parallel rank]`."""
    owners: dict[int, set[int]]
    """Data-parallel ranks that own rows of each parameter, by its index."""


def group_costs(parameters: Sequence[PlannedParam], num_ranks: int, num_slices: int, config: RunConfig) -> GroupCosts:
    """Every rank of a lane by its real owners. `num_slices` tensor-parallel ranks cut each matrix."""
    if not parameters:
        return GroupCosts([[GroupRankCost() for _ in range(num_slices)] for _ in range(num_ranks)], {})
    by_index = {parameter.spec.index: parameter for parameter in parameters}
    placed = place_params([parameter.spec for parameter in parameters], num_ranks, config.parallel.bucket_size)
    fragments = [fragment for _, found in placed for fragment in found]
    owners: dict[int, set[int]] = {}
    of_rank: list[list[RowShard]] = [[] for _ in range(num_ranks)]
    homes: list[list[RowShard]] = [[] for _ in range(num_ranks)]
    for fragment in fragments:
        owners.setdefault(fragment.param_index, set()).add(fragment.owner_rank)
        of_rank[fragment.owner_rank].append(fragment)
        if fragment.is_split and fragment.start == fragment.matrix_start:
            homes[fragment.home_rank].append(fragment)
    two_stages = [p.spec.index for p in parameters if p.spec.is_shared_embedding]
    found = muon_costs(fragments, num_ranks, config, two_stages)
    if num_ranks > 1:
        gradients, weights, first = _buffers([_sizes(part, num_ranks) for _, part in placed], config)
    else:
        gradients, weights, first = [0.0], [0.0], [0.0]
    ranks = []
    for rank, share in enumerate(found):
        shards = sum(f.numel for f in of_rank[rank]) * GRADIENT_BYTES if num_ranks > 1 else 0
        matrices = _matrices(of_rank[rank], homes[rank], by_index, num_slices, config)
        ranks.append(
            [
                GroupRankCost(
                    share,
                    flow,
                    shards,
                    gradients[rank],
                    weights[rank],
                    first[rank],
                    update_bytes(work, config),
                    work.flops(config),
                )
                for flow, work in matrices
            ]
        )
    return GroupCosts(ranks, owners)


def mean_group_cost(
    parameters: Sequence[PlannedParam], num_ranks: int, num_slices: int, config: RunConfig
) -> GroupRankCost:
    """As if every rank owned its mean share: close, and much faster than asking for the owners."""
    outlines = [parameter.spec for parameter in parameters]
    numel, muon = sum(o.numel for o in outlines), sum(o.numel for o in outlines if o.is_matrix)
    twice = sum(o.numel for o in outlines if o.is_shared_embedding)
    state = zero1_cost(numel, num_ranks, config, twice)
    state.masters = numel * master_bytes(config) / num_ranks
    state.momenta = (muon * momentum_bytes(config) + (numel - muon) * 8) / num_ranks
    sliced = sum(p.numel for p in parameters if p.tp_mode != "unsharded" and p.spec.is_matrix) / num_ranks
    wire = 2 * sliced * direction_bytes(config) * (num_slices - 1) / num_slices
    work = Matrices()
    for parameter in parameters:
        if parameter.spec.is_matrix:
            for height, count in Counter(parameter.spec.block_rows).items():
                shape = _whole(parameter, height, num_slices)
                share_of_rank = count / num_ranks / (num_slices if parameter.tp_mode != "unsharded" else 1)
                work.add(shape, share_of_rank, is_local=parameter.tp_mode == "unsharded")
    sizes = []
    for bucket in make_buckets(outlines, num_ranks, config.parallel.bucket_size):
        total = sum(o.numel for o in bucket)
        limit = round_limit(total, num_ranks) * num_ranks
        sizes += [min(limit, total - start) for start in range(0, total, limit)]
    under_way = max((sum(sizes[i : i + MAX_IN_FLIGHT]) for i in range(len(sizes))), default=0) if num_ranks > 1 else 0
    work.elements_of_members = sliced
    work.elements_of_adamw = (numel - muon) / num_ranks
    return GroupRankCost(
        state,
        CommBytes(wire, wire),
        numel * GRADIENT_BYTES / num_ranks if num_ranks > 1 else 0,
        2 * under_way * gradient_bytes(config),
        2 * under_way * weight_bytes(config),
        2 * sum(sizes[-MAX_IN_FLIGHT:]) * weight_bytes(config) if num_ranks > 1 else 0,
        update_bytes(work, config),
        work.flops(config),
    )


def _whole(parameter: PlannedParam, rows: int, num_slices: int) -> tuple[int, int]:
    """Shape of one of its matrices of so many rows here, with tensor parallelism undone."""
    shape = [rows, parameter.spec.columns]
    if parameter.tp_mode == "sharded":
        shape[parameter.tp_dim] *= num_slices
    return shape[0], shape[1]


def _sizes(fragments: Iterable[RowShard], num_ranks: int) -> list[int]:
    sizes = [0] * num_ranks
    for fragment in fragments:
        sizes[fragment.owner_rank] += fragment.numel
    return sizes


def _buffers(bucket_sizes: Sequence[Sequence[int]], config: RunConfig) -> list[list[float]]:
    """Of every rank, the most that gradients, and that weights, need while so many rounds as may be are under way; and
    what the first rounds of weights need.

    A round of gradients needs what is sent (all rows) and what is received (own rows from every rank); one of weights
    own rows for every other rank, and all others' rows.
    """
    num_ranks, weight = len(bucket_sizes[0]), weight_bytes(config)
    by_bucket = [[sizes for _, sizes in comm_rounds(bucket)] for bucket in bucket_sizes]
    down = [sizes for bucket in by_bucket for sizes in bucket]
    up = [sizes for bucket in reversed(by_bucket) for sizes in bucket]
    gradients, weights, first = ([0.0] * num_ranks for _ in range(3))
    for order, most in ((down, gradients), (up, weights)):
        totals = [sum(sizes) for sizes in order]
        for rank in range(num_ranks):
            if order is down:
                of_round = [
                    gradient_bytes(config) * (t + num_ranks * s[rank]) for t, s in zip(totals, order, strict=True)
                ]
            else:
                of_round = [weight * (t + (num_ranks - 2) * s[rank]) for t, s in zip(totals, order, strict=True)]
            most[rank] = max(sum(of_round[i : i + MAX_IN_FLIGHT]) for i in range(len(of_round)))
            first[rank] = sum(of_round[:MAX_IN_FLIGHT])
    return [gradients, weights, first]


def _matrices(
    mine: Sequence[RowShard],
    homes: Sequence[RowShard],
    by_index: dict[int, PlannedParam],
    num_slices: int,
    config: RunConfig,
) -> list[tuple[CommBytes, Matrices]]:
    """Of a data-parallel rank's tensor-parallel peers: what they exchange, and what each orthogonalises.

    `homes`: first rows of the cut matrices that are brought together here. Peers share out their matrices in the order
    of `optim/gathered.py`.
    """
    work = [Matrices() for _ in range(num_slices)]
    sliced: list[tuple[PlannedParam, tuple[int, int]]] = []

    def add(parameter: PlannedParam, rows: int, count: int, *, is_local: bool) -> None:
        shape = _whole(parameter, rows, num_slices)
        if parameter.tp_mode != "unsharded":
            sliced.extend([(parameter, shape)] * count)
            return
        for of_peer in work:
            of_peer.add(shape, count, is_local=is_local)

    in_order = sorted(homes, key=lambda fragment: (fragment.param_index, fragment.start))
    for fragment in in_order:
        add(by_index[fragment.param_index], fragment.matrix_rows, 1, is_local=False)
    replicated = 0
    for fragment in sorted(mine, key=lambda fragment: (fragment.param_index, fragment.start)):
        parameter = by_index[fragment.param_index]
        if parameter.tp_mode == "replicated":
            replicated += fragment.numel
        if not fragment.matrix_rows:
            for of_peer in work:
                of_peer.elements_of_adamw += fragment.numel
            continue
        if fragment.is_split or parameter.tp_mode != "unsharded":
            for of_peer in work:
                of_peer.elements_of_members += fragment.numel
        if not fragment.is_split:
            rows = fragment.stop - fragment.start
            add(parameter, fragment.matrix_rows, rows // fragment.matrix_rows, is_local=True)
    others = num_slices - 1
    sent, received = [[0.0] * num_slices for _ in range(2)]
    element = direction_bytes(config)
    owners = balance_by_cost([newton_schulz_cost(*shape) for _, shape in sliced], num_slices)
    for (parameter, shape), owner in zip(sliced, owners, strict=True):
        numel = shape[0] * shape[1]
        work[owner].add(shape, 1, is_local=False)
        is_cut = parameter.tp_mode == "sharded"
        part = numel / num_slices if is_cut else numel
        for rank in range(num_slices):
            if rank == owner:  # collects the slices, hands back the results
                sent[rank] += others * part * element
                received[rank] += others * part * element if is_cut else 0
            else:
                sent[rank] += part * element if is_cut else 0
                received[rank] += part * element
    ring = 2 * others / num_slices * replicated * GRADIENT_BYTES
    return [(CommBytes(sent[t] + ring, received[t] + ring), work[t]) for t in range(num_slices)]
