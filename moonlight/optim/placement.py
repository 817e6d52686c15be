"""Parameters in buckets and their rows with owners, from what their shapes tell alone. No torch.

The optimizer asks with the parameters that it has, `moonlight plan` with those that a layout would give a rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moonlight.optim.partition import Block, Fragment, partition

SMALLEST_BUCKET = 40_000_000
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
class Outline:
    """One parameter of a rank, as rows x columns."""

    index: int
    columns: int
    heights: tuple[int, ...]
    """Rows of each matrix for Muon, of each part of a fused projection for AdamW."""
    is_matrix: bool
    """Whether Muon updates it."""
    on_two_stages: bool
    """Whether the first and the last of several pipeline stages each hold a copy."""

    @property
    def numel(self) -> int:
        return sum(self.heights) * self.columns

    def blocks(self, bucket: int) -> Iterator[Block]:
        """Its rows, in a bucket of that number, divided at `heights`."""
        start = 0
        for height in self.heights:
            yield Block(self.index, start, start + height, self.columns, self.is_matrix, bucket)
            start += height


def buckets(parameters: Sequence[Outline], num_ranks: int, bucket_size: int = 0) -> list[list[Outline]]:
    """Parameters from the last to the first, as a backward pass completes them, in runs that travel together.

    What two pipeline stages hold has a bucket of its own.

    Args:
        bucket_size: elements that close a bucket; 0 takes enough for a matrix or two of each rank, so that owners'
            regions of one bucket are not too uneven, but a quarter of all at most.
    """
    total = sum(parameter.numel for parameter in parameters)
    size = bucket_size or max(SMALLEST_BUCKET, min(ELEMENTS_PER_RANK * num_ranks, total // 4))
    runs: list[list[Outline]] = []
    elements = size
    for parameter in reversed(parameters):
        if elements >= size or runs[-1][-1].on_two_stages != parameter.on_two_stages:
            runs.append([])
            elements = 0
        runs[-1].append(parameter)
        elements += parameter.numel
    return runs


def place(
    parameters: Sequence[Outline], num_ranks: int, bucket_size: int = 0
) -> list[tuple[list[Outline], list[Fragment]]]:
    """`buckets`, and who owns their rows.

    What two pipeline stages hold has a partition of its own: their other parameters differ, and both must give its rows
    to the same data-parallel ranks.
    """
    runs = buckets(parameters, num_ranks, bucket_size)
    bucket_of = {parameter.index: number for number, run in enumerate(runs) for parameter in run}
    of_parameter: dict[int, list[Fragment]] = {parameter.index: [] for parameter in parameters}
    for on_two_stages in (False, True):
        own = [parameter for parameter in parameters if parameter.on_two_stages == on_two_stages]
        blocks = [block for parameter in own for block in parameter.blocks(bucket_of[parameter.index])]
        for fragment in partition(blocks, num_ranks):
            of_parameter[fragment.parameter].append(fragment)
    return [(run, [fragment for p in run for fragment in of_parameter[p.index]]) for run in runs]


def round_limit(numel: int, num_ranks: int) -> int:
    """Most elements of one rank's region that a round carries, of a bucket of `numel` elements."""
    return min(-(-ROUND_FACTOR * numel // num_ranks), max(1, ROUND_ELEMENTS // num_ranks))


def rounds(sizes: Sequence[int]) -> list[tuple[int, list[int]]]:
    """A bucket whose owners' regions have these sizes, as rounds: where each starts in the regions, and its sizes."""
    limit = round_limit(sum(sizes), len(sizes))
    return [(start, [max(0, min(limit, size - start)) for size in sizes]) for start in range(0, max(sizes), limit)]
