"""Packing whole conversations into sequences of one length."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of the conversations of each sequence: best fit, the longest first.

    Each goes into the fullest sequence that has room for it. `lengths` are tokens, at most `room`, those of a
    sequence. The result depends on them alone.
    """
    sequences: list[list[int]] = []
    open_by_room: dict[int, list[int]] = {}
    """Sequences with so much room left."""
    rooms: list[int] = []
    """The keys of `open_by_room`, rising."""
    for number in numpy.argsort(-numpy.asarray(lengths, dtype=numpy.int64), kind="stable").tolist():
        length = lengths[number]
        assert 0 < length <= capacity, (number, length, capacity)
        place = bisect_left(rooms, length)
        if place == len(rooms):
            sequence, left = len(sequences), capacity
            sequences.append([])
        else:
            left = rooms[place]
            sequence = open_by_room[left].pop()
            if not open_by_room[left]:
                del open_by_room[left], rooms[place]
        sequences[sequence].append(number)
        left -= length
        if left:
            if left not in open_by_room:
                open_by_room[left] = []
                insort(rooms, left)
            open_by_room[left].append(sequence)
    return sequences
