"""Owners: every row has one owner, matrices are split only if necessary, and no rank is far above the mean."""

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from moonlight.placement.owners import TOLERANCE, RowBlock, assign_owners, balance_by_cost

parameters = st.lists(
    st.tuples(st.booleans(), st.integers(1, 4), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=12
)
"""(is Muon, matrices, rows of each, columns)"""


def make_blocks(drawn) -> list[RowBlock]:
    """Return blocks: one per matrix of a Muon parameter, and one per AdamW parameter."""
    blocks = []
    for index, (is_matrix, count, rows, columns) in enumerate(drawn):
        if is_matrix:
            blocks += [RowBlock(index, n * rows, (n + 1) * rows, columns, True) for n in range(count)]
        else:
            blocks.append(RowBlock(index, 0, count * rows * 100, columns, False))
    return blocks


@settings(max_examples=200, deadline=None)
@given(parameters, st.integers(1, 9))
def test_every_row_has_one_owner_and_matrices_have_one_home(drawn, num_ranks):
    blocks = make_blocks(drawn)
    shards = assign_owners(blocks, num_ranks)
    assert shards == assign_owners(blocks, num_ranks)
    for index in {block.param_index for block in blocks}:
        rows = sorted((f.start, f.stop) for f in shards if f.param_index == index)
        assert rows[0][0] == 0 and rows[-1][1] == max(b.stop for b in blocks if b.param_index == index)
        assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(rows))
    starts = {(b.param_index, b.start): b for b in blocks if b.is_matrix}
    for f in shards:
        assert 0 <= f.owner_rank < num_ranks and f.start < f.stop
        if f.is_split:
            matrix = starts[f.param_index, f.matrix_start]
            assert matrix.start <= f.start < f.stop <= matrix.stop
            parts = [g for g in shards if g.param_index == f.param_index and g.matrix_start == f.matrix_start]
            assert len({g.owner_rank for g in parts}) == len(parts)
            assert {g.home_rank for g in parts} <= {g.owner_rank for g in parts} and len(
                {g.home_rank for g in parts}
            ) == 1
        elif f.matrix_rows:
            assert f.home_rank == f.owner_rank and (f.stop - f.start) % f.matrix_rows == 0
            assert (f.param_index, f.start) in starts


@settings(max_examples=200, deadline=None)
@given(parameters, st.integers(2, 9))
def test_no_rank_is_far_above_the_mean(drawn, num_ranks):
    blocks = make_blocks(drawn)
    shards = assign_owners(blocks, num_ranks)
    elements = [0] * num_ranks
    for f in shards:
        elements[f.owner_rank] += f.numel
    mean = sum(elements) / num_ranks
    # Indivisible rows may exceed the mean: a one-row matrix, a row of a split matrix, a small AdamW block.
    widest = max(block.columns for block in blocks)
    smallest = max((b.numel for b in blocks if not b.is_matrix and b.numel < 1024 * num_ranks), default=0)
    rounding = max((math.ceil(b.numel / 2) for b in blocks if b.is_matrix), default=0)
    assert max(elements) <= TOLERANCE * mean + widest + smallest + rounding


def test_equal_matrices_are_adjacent_and_evenly_owned():
    blocks = [RowBlock(0, n * 8, (n + 1) * 8, 16, True) for n in range(12)]
    shards = assign_owners(blocks, 4)
    assert [(f.start, f.stop, f.owner_rank) for f in shards] == [(0, 24, 0), (24, 48, 1), (48, 72, 2), (72, 96, 3)]


def test_adamw_rows_even_out_the_ranks():
    blocks = [RowBlock(0, 0, 100, 100, True), RowBlock(1, 0, 5000, 10, False)]
    elements = [0] * 3
    for f in assign_owners(blocks, 3):
        elements[f.owner_rank] += f.numel
    assert max(elements) - min(elements) <= 20


def test_more_ranks_than_matrices():
    shards = assign_owners([RowBlock(0, 0, 64, 8, True), RowBlock(1, 0, 1, 8, True)], 8)
    assert {f.owner_rank for f in shards if f.param_index == 0} == set(range(8))
    assert len([f for f in shards if f.param_index == 1]) == 1


def test_longest_jobs_are_assigned_first():
    assert balance_by_cost([3, 9, 5, 4], 2) == [0, 0, 1, 1]
    assert balance_by_cost([], 4) == []
