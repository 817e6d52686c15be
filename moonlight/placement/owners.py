"""Which data-parallel rank owns which rows of which parameter, for Muon and AdamW alike. No torch.

Every parameter is seen as rows x columns: an expert stack [experts, in, out] as experts * in rows, a norm's gain as
rows of one element. It is divided into blocks of rows: one block per matrix for Muon, which wants whole matrices; one
per parameter (or fused half) for AdamW, whose rows may go anywhere. docs/distributed_muon.md has a drawing.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

TOLERANCE = 1.05
"""A matrix that would lift its owner above this many times the mean is cut by rows over several owners."""

SLACK = 0.1
"""Newton-Schulz work that differs by less than this share of the mean counts as equal."""

MIN_SPLIT_ELEMENTS = 1024
"""An AdamW block is cut over all ranks only if each would get this many elements; smaller ones stay whole."""


def newton_schulz_cost(rows: int, columns: int) -> int:
    """Work in arbitrary units: 2 n^2 m + n^3 for a matrix of short side n and long side m."""
    short, long = sorted((rows, columns))
    return short * short * (2 * long + short)


@dataclass(frozen=True)
class RowBlock:
    """Rows [start, stop) of one parameter. Those of one matrix if `is_matrix`."""

    param_index: int
    start: int
    stop: int
    columns: int
    is_matrix: bool
    bucket: int = 0
    """Of the exchange with other ranks."""

    @property
    def numel(self) -> int:
        return (self.stop - self.start) * self.columns

    @property
    def cost(self) -> int:
        return newton_schulz_cost(self.stop - self.start, self.columns) if self.is_matrix else 0


@dataclass(frozen=True)
class RowShard:
    """Rows [start, stop) of one parameter that one rank owns: several whole matrices, rows of one, or AdamW's rows."""

    param_index: int
    start: int
    stop: int
    columns: int
    owner_rank: int
    matrix_rows: int = 0
    """Height of its whole matrices; 0 for AdamW."""
    home_rank: int = -1
    """Rank that orthogonalises them: the owner, unless the matrix is cut over several owners."""
    matrix_start: int = -1
    """First row of the cut matrix that these rows belong to; -1 if its matrices are whole."""

    @property
    def numel(self) -> int:
        return (self.stop - self.start) * self.columns

    @property
    def is_split(self) -> bool:
        return self.matrix_start >= 0


def balance_by_cost(costs: Sequence[int], num_ranks: int) -> list[int]:
    """A rank for each job, longest first to whoever has least to do."""
    load = [0] * num_ranks
    owners = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        rank = min(range(num_ranks), key=load.__getitem__)
        owners[job] = rank
        load[rank] += costs[job]
    return owners


def assign_owners(blocks: Sequence[RowBlock], num_ranks: int) -> list[RowShard]:
    """Give every row an owner. All ranks compute the same answer, in the order of the parameters.

    Matrices go, longest processing time first, to a rank with least Newton-Schulz work among those whose elements
    stay within the mean; of several that differ little, to the one with least of the same bucket. Where none has
    room, to the rank with fewest elements. A matrix that would lift even that one above TOLERANCE times the mean, or
    is that much larger than a mean region of its bucket, is cut by rows over several ranks, one of which is its home.
    AdamW's rows then fill every rank up to one level, so that what a rank sends, receives and stores is as even as
    rows allow.
    """
    elements, work = [0] * num_ranks, [0] * num_ranks
    in_bucket = {block.bucket: [0] * num_ranks for block in blocks}
    region = dict.fromkeys(in_bucket, 0.0)
    for block in blocks:
        region[block.bucket] += block.numel / num_ranks
    mean, slack = sum(region.values()), SLACK * sum(block.cost for block in blocks) / num_ranks
    fragments: list[RowShard] = []
    whole: dict[tuple[int, int], list[tuple[RowBlock, int]]] = {}

    def give(rank: int, block: RowBlock, numel: int) -> None:
        elements[rank] += numel
        in_bucket[block.bucket][rank] += numel

    for block in sorted((block for block in blocks if block.is_matrix), key=lambda block: -block.cost):
        rows, there = block.stop - block.start, in_bucket[block.bucket]
        space = min(mean - min(elements), region[block.bucket])
        lifts = min(elements) + block.numel > TOLERANCE * mean or block.numel > TOLERANCE * region[block.bucket]
        if lifts and min(rows, num_ranks) > 1:
            parts = min(rows, num_ranks, max(2, math.ceil(block.numel / max(space, block.numel / num_ranks))))
            full = mean - block.numel / parts
            owners = sorted(range(num_ranks), key=lambda rank: (elements[rank] > full, there[rank], elements[rank]))
            owners = sorted(owners[:parts])
            home = min(owners, key=lambda rank: (work[rank], rank))
            work[home] += block.cost
            for part, owner in enumerate(owners):
                start, stop = (block.start + rows * p // parts for p in (part, part + 1))
                give(owner, block, (stop - start) * block.columns)
                fragments.append(
                    RowShard(block.param_index, start, stop, block.columns, owner, rows, home, block.start)
                )
            continue
        fitting = [rank for rank in range(num_ranks) if elements[rank] + block.numel <= mean]
        if fitting:
            enough = min(work[rank] for rank in fitting) + slack
            owner = min(fitting, key=lambda rank: (work[rank] > enough, there[rank], work[rank], elements[rank]))
        else:
            owner = min(range(num_ranks), key=lambda rank: (elements[rank], there[rank], work[rank]))
        work[owner] += block.cost
        give(owner, block, block.numel)
        whole.setdefault((block.param_index, rows), []).append((block, owner))
    for placed in whole.values():
        fragments += _runs(placed)
    fragments += _fill([block for block in blocks if not block.is_matrix], elements)
    return sorted(fragments, key=lambda fragment: (fragment.param_index, fragment.start))


def _runs(placed: list[tuple[RowBlock, int]]) -> list[RowShard]:
    """Fragments of the equal matrices of one parameter: each owner keeps its count, but gets neighbours."""
    owners = sorted(owner for _, owner in placed)
    fragments: list[RowShard] = []
    for block, owner in zip(sorted((block for block, _ in placed), key=lambda b: b.start), owners, strict=True):
        last = fragments[-1] if fragments else None
        rows = block.stop - block.start
        if last is not None and last.owner_rank == owner and last.stop == block.start:
            fragments.pop()
            fragments.append(RowShard(block.param_index, last.start, block.stop, block.columns, owner, rows, owner))
        else:
            fragments.append(RowShard(block.param_index, block.start, block.stop, block.columns, owner, rows, owner))
    return fragments


def _fill(blocks: list[RowBlock], elements: list[int]) -> list[RowShard]:
    """AdamW's rows, small blocks whole and large ones cut, to lift the ranks that have least to one level."""
    fragments = []
    num_ranks = len(elements)
    missing = _missing(elements, sum(block.numel for block in blocks))
    for block in sorted(blocks, key=lambda block: block.numel):
        if block.numel < MIN_SPLIT_ELEMENTS * num_ranks:
            owner = max(range(num_ranks), key=lambda rank: missing[rank])
            missing[owner] -= block.numel
            fragments.append(RowShard(block.param_index, block.start, block.stop, block.columns, owner))
            continue
        weights = [max(0.0, m) for m in missing]
        rows, total, before, start = block.stop - block.start, sum(weights), 0.0, block.start
        for owner, weight in enumerate(weights):
            before += weight
            stop = block.start + round(rows * before / total) if before < total else block.stop
            if stop > start:
                fragments.append(RowShard(block.param_index, start, stop, block.columns, owner))
                missing[owner] -= (stop - start) * block.columns
                start = stop
    return fragments


def _missing(elements: list[int], total: int) -> list[float]:
    """How much each rank takes of `total` elements so that the emptiest ranks end level."""
    level, below = 0.0, sorted(elements)
    for count in range(1, len(below) + 1):
        level = (total + sum(below[:count])) / count
        if count == len(below) or level <= below[count]:
            break
    return [max(0.0, level - there) for there in elements]


MIN_BUCKET_ELEMENTS = 40_000_000
ELEMENTS_PER_RANK = 8_000_000
"""Of a bucket of automatic size."""

AT_ONCE = 2**26
"""Elements whose updates a GPU makes at once, or those of one matrix. Bounds the memory of an update."""

GRAM_FROM_SIDE = 256
"""Short side from which a GPU orthogonalises in symmetric tiles of 128 (gram.py): smaller matrices have few above their
diagonals. Not measured yet."""

MAX_IN_FLIGHT = 2
"""Rounds of an exchange under way at once: one on the wire while the next is packed. Bounds the memory of buffers."""

ROUND_FACTOR = 2
"""A round carries at most this many times the mean region of each rank."""
ROUND_ELEMENTS = 2**27
"""And of all ranks together at most this many: half a GiB of float32 gradients, 256 KiB for each of 2,048 ranks."""


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of a rank, as rows x columns."""

    index: int
    columns: int
    block_rows: tuple[int, ...]
    """Rows of each matrix for Muon, of each part of a fused projection for AdamW."""
    is_matrix: bool
    """Whether Muon updates it."""
    is_shared_embedding: bool
    """Whether the first and the last of several pipeline stages each hold a copy."""

    @property
    def numel(self) -> int:
        return sum(self.block_rows) * self.columns

    def blocks(self, bucket: int) -> Iterator[RowBlock]:
        """Its rows, in a bucket of that number, divided at `heights`."""
        start = 0
        for height in self.block_rows:
            yield RowBlock(self.index, start, start + height, self.columns, self.is_matrix, bucket)
            start += height


def make_buckets(parameters: Sequence[ParamSpec], num_ranks: int, bucket_size: int = 0) -> list[list[ParamSpec]]:
    """Parameters from the last to the first, as a backward pass completes them, in runs that travel together.

    What two pipeline stages hold has a bucket of its own.

    Args:
        bucket_size: elements that close a bucket; 0 takes enough for a matrix or two of each rank, so that owners'
            regions of one bucket are not too uneven, but a quarter of all at most.
    """
    total = sum(parameter.numel for parameter in parameters)
    size = bucket_size or max(MIN_BUCKET_ELEMENTS, min(ELEMENTS_PER_RANK * num_ranks, total // 4))
    runs: list[list[ParamSpec]] = []
    elements = size
    for parameter in reversed(parameters):
        if elements >= size or runs[-1][-1].is_shared_embedding != parameter.is_shared_embedding:
            runs.append([])
            elements = 0
        runs[-1].append(parameter)
        elements += parameter.numel
    return runs


def place_params(
    parameters: Sequence[ParamSpec], num_ranks: int, bucket_size: int = 0
) -> list[tuple[list[ParamSpec], list[RowShard]]]:
    """`buckets`, and who owns their rows.

    What two pipeline stages hold has a partition of its own: their other parameters differ, and both must give its rows
    to the same data-parallel ranks.
    """
    runs = make_buckets(parameters, num_ranks, bucket_size)
    bucket_of = {parameter.index: index for index, run in enumerate(runs) for parameter in run}
    of_parameter: dict[int, list[RowShard]] = {parameter.index: [] for parameter in parameters}
    for on_two_stages in (False, True):
        own = [parameter for parameter in parameters if parameter.is_shared_embedding == on_two_stages]
        blocks = [block for parameter in own for block in parameter.blocks(bucket_of[parameter.index])]
        for fragment in assign_owners(blocks, num_ranks):
            of_parameter[fragment.param_index].append(fragment)
    return [(run, [fragment for p in run for fragment in of_parameter[p.index]]) for run in runs]


def round_limit(numel: int, num_ranks: int) -> int:
    """Most elements of one rank's region that a round carries, of a bucket of `numel` elements."""
    return min(-(-ROUND_FACTOR * numel // num_ranks), max(1, ROUND_ELEMENTS // num_ranks))


def comm_rounds(sizes: Sequence[int]) -> list[tuple[int, list[int]]]:
    """A bucket whose owners' regions have these sizes, as rounds: where each starts in the regions, and its sizes."""
    limit = round_limit(sum(sizes), len(sizes))
    return [(start, [max(0, min(limit, size - start)) for size in sizes]) for start in range(0, max(sizes), limit)]
