"""Pack complete conversations into sequences of equal length."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the indices of the conversations in each sequence, by best-fit decreasing.

    From the longest to the shortest, each conversation is added to the sequence with the least remaining capacity that
    fits it. The result depends on the arguments alone.

    Args:
        lengths: tokens of each conversation, from 1 to `capacity`.
        capacity: tokens of a sequence.
    """
    sequences: list[list[int]] = []
    open_sequences: dict[int, list[int]] = {}
    """Indices of sequences by remaining capacity."""
    capacities: list[int] = []
    """The keys of `open_sequences`, sorted."""
    for index in numpy.argsort(-numpy.asarray(lengths, dtype=numpy.int64), kind="stable").tolist():
        length = lengths[index]
        assert 0 < length <= capacity, (index, length, capacity)
        position = bisect_left(capacities, length)
        if position == len(capacities):
            sequence, remaining = len(sequences), capacity
            sequences.append([])
        else:
            remaining = capacities[position]
            sequence = open_sequences[remaining].pop()
            if not open_sequences[remaining]:
                del open_sequences[remaining], capacities[position]
        sequences[sequence].append(index)
        remaining -= length
        if remaining:
            if remaining not in open_sequences:
                open_sequences[remaining] = []
                insort(capacities, remaining)
            open_sequences[remaining].append(sequence)
    return sequences
