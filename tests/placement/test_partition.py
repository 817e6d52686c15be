"""Owners: every row exactly once, matrices whole unless they must be cut, nobody with much more than a mean share."""

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from moonlight.placement.owners import TOLERANCE, Block, newton_schulz_owners, partition

parameters = st.lists(
    st.tuples(st.booleans(), st.integers(1, 4), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=12
)
"""(Muon, matrices, rows of each, columns)"""


def blocks_of(drawn) -> list[Block]:
    """Blocks of parameters with several matrices each; AdamW's have one block."""
    blocks = []
    for index, (is_matrix, count, rows, columns) in enumerate(drawn):
        if is_matrix:
            blocks += [Block(index, n * rows, (n + 1) * rows, columns, True) for n in range(count)]
        else:
            blocks.append(Block(index, 0, count * rows * 100, columns, False))
    return blocks


@settings(max_examples=200, deadline=None)
@given(parameters, st.integers(1, 9))
def test_every_row_has_one_owner_and_matrices_stay_whole(drawn, num_ranks):
    blocks = blocks_of(drawn)
    fragments = partition(blocks, num_ranks)
    assert fragments == partition(blocks, num_ranks)
    for index in {block.parameter for block in blocks}:
        rows = sorted((f.start, f.stop) for f in fragments if f.parameter == index)
        assert rows[0][0] == 0 and rows[-1][1] == max(b.stop for b in blocks if b.parameter == index)
        assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(rows))
    starts = {(b.parameter, b.start): b for b in blocks if b.is_matrix}
    for f in fragments:
        assert 0 <= f.owner < num_ranks and f.start < f.stop
        if f.is_cut:
            matrix = starts[f.parameter, f.matrix_start]
            assert matrix.start <= f.start < f.stop <= matrix.stop
            parts = [g for g in fragments if g.parameter == f.parameter and g.matrix_start == f.matrix_start]
            assert len({g.owner for g in parts}) == len(parts)
            assert {g.home for g in parts} <= {g.owner for g in parts} and len({g.home for g in parts}) == 1
        elif f.matrix_rows:
            assert f.home == f.owner and (f.stop - f.start) % f.matrix_rows == 0
            assert (f.parameter, f.start) in starts


@settings(max_examples=200, deadline=None)
@given(parameters, st.integers(2, 9))
def test_no_rank_is_far_above_the_mean(drawn, num_ranks):
    blocks = blocks_of(drawn)
    fragments = partition(blocks, num_ranks)
    elements = [0] * num_ranks
    for f in fragments:
        elements[f.owner] += f.numel
    mean = sum(elements) / num_ranks
    # What cannot be divided may stand out: a one-row matrix, rows of a cut one, a small AdamW block.
    widest = max(block.columns for block in blocks)
    smallest = max((b.numel for b in blocks if not b.is_matrix and b.numel < 1024 * num_ranks), default=0)
    rounding = max((math.ceil(b.numel / 2) for b in blocks if b.is_matrix), default=0)
    assert max(elements) <= TOLERANCE * mean + widest + smallest + rounding


def test_equal_matrices_are_neighbours_and_evenly_owned():
    blocks = [Block(0, n * 8, (n + 1) * 8, 16, True) for n in range(12)]
    fragments = partition(blocks, 4)
    assert [(f.start, f.stop, f.owner) for f in fragments] == [(0, 24, 0), (24, 48, 1), (48, 72, 2), (72, 96, 3)]


def test_adamw_fills_up_what_matrices_leave():
    blocks = [Block(0, 0, 100, 100, True), Block(1, 0, 5000, 10, False)]
    elements = [0] * 3
    for f in partition(blocks, 3):
        elements[f.owner] += f.numel
    assert max(elements) - min(elements) <= 20


def test_a_world_larger_than_the_number_of_matrices():
    fragments = partition([Block(0, 0, 64, 8, True), Block(1, 0, 1, 8, True)], 8)
    assert {f.owner for f in fragments if f.parameter == 0} == set(range(8))
    assert len([f for f in fragments if f.parameter == 1]) == 1


def test_longest_jobs_first():
    assert newton_schulz_owners([3, 9, 5, 4], 2) == [0, 0, 1, 1]
    assert newton_schulz_owners([], 4) == []
