"""Owner ranks: assign every row of every parameter to one data-parallel rank, for Muon and AdamW. No torch.

Every parameter is rows x columns: an expert stack [experts, in, out] has experts * in rows, and a norm's gain has rows
of one element. Rows form blocks. For Muon, which needs full matrices, a block is one matrix. For AdamW, whose rows may
go to any rank, a block is a parameter or one part of a fused projection.

`place_params` builds the buckets (`make_buckets`) and assigns their blocks (`assign_owners`). `comm_rounds` splits the
exchange of a bucket into rounds. docs/distributed_muon.md has a diagram.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

TOLERANCE = 1.05
"""A matrix that would raise its owner rank above this many times the mean is split by rows over several owner ranks."""

SLACK = 0.1
"""Newton-Schulz work that differs by less than this fraction of the mean counts as equal."""

MIN_SPLIT_ELEMENTS = 1024
"""An AdamW block is split over ranks only if it has this many elements per rank."""


def newton_schulz_cost(rows: int, columns: int) -> int:
    """Return the work in arbitrary units: 2 n^2 m + n^3 for a matrix of short side n and long side m."""
    short, long = sorted((rows, columns))
    return short * short * (2 * long + short)


@dataclass(frozen=True)
class RowBlock:
    """Rows [start, stop) of one parameter: one matrix if `is_matrix`, otherwise rows for AdamW."""

    param_index: int
    start: int
    stop: int
    columns: int
    is_matrix: bool
    bucket: int = 0
    """Index of the bucket that exchanges these rows."""

    @property
    def numel(self) -> int:
        return (self.stop - self.start) * self.columns

    @property
    def cost(self) -> int:
        return newton_schulz_cost(self.stop - self.start, self.columns) if self.is_matrix else 0


@dataclass(frozen=True)
class RowShard:
    """Rows [start, stop) of one parameter that one rank owns: several full matrices, rows of one, or rows for AdamW."""

    param_index: int
    start: int
    stop: int
    columns: int
    owner_rank: int
    matrix_rows: int = 0
    """Rows of each full matrix that these rows belong to; 0 for AdamW."""
    home_rank: int = -1
    """Rank that orthogonalizes the matrices: the owner rank, or one of several if the matrix is split; -1 for AdamW."""
    matrix_start: int = -1
    """First row of the split matrix that these rows belong to; -1 if no matrix is split."""

    @property
    def numel(self) -> int:
        return (self.stop - self.start) * self.columns

    @property
    def is_split(self) -> bool:
        return self.matrix_start >= 0


def balance_by_cost(costs: Sequence[int], num_ranks: int) -> list[int]:
    """Return a rank for each of `costs`: longest first, to the least loaded rank."""
    load = [0] * num_ranks
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        rank = min(range(num_ranks), key=load.__getitem__)
        owners[index] = rank
        load[rank] += costs[index]
    return owners


def assign_owners(blocks: Sequence[RowBlock], num_ranks: int) -> list[RowShard]:
    """Assign every row to an owner rank. Return shards sorted by parameter and row, the same on all ranks.

    1. Matrices, in order of Newton-Schulz work, longest first. Eligible are the ranks whose elements stay within the
       mean. The matrix goes to the eligible rank with the least work. If several differ by less than SLACK, the one
       with the fewest elements of the same bucket gets it. If no rank is eligible, the rank with the fewest elements
       does.
    2. A matrix that would raise even that rank above TOLERANCE times the mean is split by rows over several ranks. So
       is a matrix larger than TOLERANCE times the mean region of its bucket. One of its ranks is the home rank.
    3. AdamW's rows, to the ranks with the fewest elements. They even out what ranks send, receive and store.
    """
    elements, work = [0] * num_ranks, [0] * num_ranks
    bucket_elements = {block.bucket: [0] * num_ranks for block in blocks}
    mean_region = dict.fromkeys(bucket_elements, 0.0)
    for block in blocks:
        mean_region[block.bucket] += block.numel / num_ranks
    mean, slack = sum(mean_region.values()), SLACK * sum(block.cost for block in blocks) / num_ranks
    shards: list[RowShard] = []
    unsplit: dict[tuple[int, int], list[tuple[RowBlock, int]]] = {}

    def add_load(rank: int, block: RowBlock, numel: int) -> None:
        elements[rank] += numel
        bucket_elements[block.bucket][rank] += numel

    for block in sorted((block for block in blocks if block.is_matrix), key=lambda block: -block.cost):
        rows, in_bucket, region = block.stop - block.start, bucket_elements[block.bucket], mean_region[block.bucket]
        space = min(mean - min(elements), region)
        too_large = min(elements) + block.numel > TOLERANCE * mean or block.numel > TOLERANCE * region
        if too_large and min(rows, num_ranks) > 1:
            parts = min(rows, num_ranks, max(2, math.ceil(block.numel / max(space, block.numel / num_ranks))))
            limit = mean - block.numel / parts
            owners = sorted(
                range(num_ranks), key=lambda rank: (elements[rank] > limit, in_bucket[rank], elements[rank])
            )
            owners = sorted(owners[:parts])
            home = min(owners, key=lambda rank: (work[rank], rank))
            work[home] += block.cost
            for part, owner in enumerate(owners):
                start, stop = (block.start + rows * p // parts for p in (part, part + 1))
                add_load(owner, block, (stop - start) * block.columns)
                shards.append(RowShard(block.param_index, start, stop, block.columns, owner, rows, home, block.start))
            continue
        eligible = [rank for rank in range(num_ranks) if elements[rank] + block.numel <= mean]
        if eligible:
            max_work = min(work[rank] for rank in eligible) + slack
            owner = min(eligible, key=lambda rank: (work[rank] > max_work, in_bucket[rank], work[rank], elements[rank]))
        else:
            owner = min(range(num_ranks), key=lambda rank: (elements[rank], in_bucket[rank], work[rank]))
        work[owner] += block.cost
        add_load(owner, block, block.numel)
        unsplit.setdefault((block.param_index, rows), []).append((block, owner))
    for placed in unsplit.values():
        shards += _join_neighbors(placed)
    shards += _fill_with_adamw([block for block in blocks if not block.is_matrix], elements)
    return sorted(shards, key=lambda shard: (shard.param_index, shard.start))


def _join_neighbors(placed: list[tuple[RowBlock, int]]) -> list[RowShard]:
    """Return shards of one parameter's equal matrices: each owner rank keeps its number of them, but gets neighbors."""
    owners = sorted(owner for _, owner in placed)
    shards: list[RowShard] = []
    for block, owner in zip(sorted((block for block, _ in placed), key=lambda b: b.start), owners, strict=True):
        start, rows = block.start, block.stop - block.start
        if shards and shards[-1].owner_rank == owner and shards[-1].stop == start:
            start = shards.pop().start
        shards.append(RowShard(block.param_index, start, block.stop, block.columns, owner, rows, owner))
    return shards


def _fill_with_adamw(blocks: list[RowBlock], elements: list[int]) -> list[RowShard]:
    """Assign AdamW's rows so that the ranks with the fewest `elements` become equal. Only large blocks are split."""
    shards = []
    num_ranks = len(elements)
    missing = _missing_elements(elements, sum(block.numel for block in blocks))
    for block in sorted(blocks, key=lambda block: block.numel):
        if block.numel < MIN_SPLIT_ELEMENTS * num_ranks:
            owner = max(range(num_ranks), key=lambda rank: missing[rank])
            missing[owner] -= block.numel
            shards.append(RowShard(block.param_index, block.start, block.stop, block.columns, owner))
            continue
        weights = [max(0.0, m) for m in missing]
        rows, total, before, start = block.stop - block.start, sum(weights), 0.0, block.start
        for owner, weight in enumerate(weights):
            before += weight
            stop = block.start + round(rows * before / total) if before < total else block.stop
            if stop > start:
                shards.append(RowShard(block.param_index, start, stop, block.columns, owner))
                missing[owner] -= (stop - start) * block.columns
                start = stop
    return shards


def _missing_elements(elements: list[int], total: int) -> list[float]:
    """Return how many of `total` elements each rank takes so that the ranks with the fewest elements become equal."""
    level, ascending = 0.0, sorted(elements)
    for count in range(1, len(ascending) + 1):
        level = (total + sum(ascending[:count])) / count
        if count == len(ascending) or level <= ascending[count]:
            break
    return [max(0.0, level - numel) for numel in elements]


MIN_BUCKET_ELEMENTS = 40_000_000
"""Minimum size of a bucket of automatic size, in elements."""
ELEMENTS_PER_RANK = 8_000_000
"""Elements per rank of a bucket of automatic size."""

MAX_UPDATE_ELEMENTS = 2**26
"""Maximum number of elements in a batch of updates on a GPU, which bounds the memory of an update. A larger matrix is a
batch of its own."""

GRAM_FROM_SIDE = 256
"""Short side from which a GPU orthogonalizes in symmetric tiles of 128 (gram_newton_schulz.py). Smaller matrices have
few tiles above the diagonal. Has not been measured."""

MAX_IN_FLIGHT = 2
"""Maximum number of rounds of a bucket group in flight: one is sent while the next is packed. Bounds buffer memory."""

ROUND_FACTOR = 2
"""Maximum slice of each rank in a round, in mean regions."""
ROUND_ELEMENTS = 2**27
"""Maximum number of elements of all ranks in a round: 512 MiB of float32 gradients, 256 KiB for each of 2,048 ranks."""


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of a rank, as rows x columns."""

    index: int
    columns: int
    block_rows: tuple[int, ...]
    """Rows of each matrix for Muon, or of each part of a fused projection for AdamW."""
    is_matrix: bool
    """True if Muon updates it."""
    is_shared_embedding: bool
    """True if the first and the last of several pipeline stages each hold a copy."""

    @property
    def numel(self) -> int:
        return sum(self.block_rows) * self.columns

    def blocks(self, bucket: int) -> Iterator[RowBlock]:
        """Yield its rows as blocks of `block_rows`; `bucket` is the index of their bucket."""
        start = 0
        for rows in self.block_rows:
            yield RowBlock(self.index, start, start + rows, self.columns, self.is_matrix, bucket)
            start += rows


def make_buckets(parameters: Sequence[ParamSpec], num_ranks: int, bucket_size: int = 0) -> list[list[ParamSpec]]:
    """Group parameters into buckets, from the last to the first, as a backward pass completes them.

    A parameter that two pipeline stages hold has a separate bucket.

    Args:
        parameters: of one data-parallel group, in model order.
        bucket_size: number of elements that completes a bucket. 0: enough for one or two matrices per rank, so that
            the regions of a bucket are not too uneven, but at most a quarter of all elements, and at least
            MIN_BUCKET_ELEMENTS.
    """
    total = sum(parameter.numel for parameter in parameters)
    size = bucket_size or max(MIN_BUCKET_ELEMENTS, min(ELEMENTS_PER_RANK * num_ranks, total // 4))
    buckets: list[list[ParamSpec]] = []
    elements = size
    for parameter in reversed(parameters):
        if elements >= size or buckets[-1][-1].is_shared_embedding != parameter.is_shared_embedding:
            buckets.append([])
            elements = 0
        buckets[-1].append(parameter)
        elements += parameter.numel
    return buckets


def place_params(
    parameters: Sequence[ParamSpec], num_ranks: int, bucket_size: int = 0
) -> list[tuple[list[ParamSpec], list[RowShard]]]:
    """Return each bucket of `make_buckets` with the shards of its rows, in the order of its parameters.

    A parameter that two pipeline stages hold has a separate assignment. The stages' other parameters differ, but both
    must assign its rows to the same data-parallel ranks.
    """
    buckets = make_buckets(parameters, num_ranks, bucket_size)
    bucket_of = {parameter.index: index for index, bucket in enumerate(buckets) for parameter in bucket}
    shards_of: dict[int, list[RowShard]] = {parameter.index: [] for parameter in parameters}
    for is_shared in (False, True):
        selected = [parameter for parameter in parameters if parameter.is_shared_embedding == is_shared]
        blocks = [block for parameter in selected for block in parameter.blocks(bucket_of[parameter.index])]
        for shard in assign_owners(blocks, num_ranks):
            shards_of[shard.param_index].append(shard)
    return [(bucket, [shard for p in bucket for shard in shards_of[p.index]]) for bucket in buckets]


def round_limit(numel: int, num_ranks: int) -> int:
    """Return the maximum number of elements of one rank in a round, for a bucket of `numel` elements."""
    return min(-(-ROUND_FACTOR * numel // num_ranks), max(1, ROUND_ELEMENTS // num_ranks))


def comm_rounds(sizes: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Split the exchange of a bucket into rounds. `sizes`: elements of each rank's region.

    Return for each round its start in every region, and the number of elements of each rank's slice.
    """
    limit = round_limit(sum(sizes), len(sizes))
    return [(start, [max(0, min(limit, size - start)) for size in sizes]) for start in range(0, max(sizes), limit)]
