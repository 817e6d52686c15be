"""Full tensors split into any chunks: written by one set of ranks, read by another."""

import math
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moonlight import parallel
from moonlight.dist_checkpoint.chunks import LocalChunks
from moonlight.dist_checkpoint.tensors import TENSOR_ALIGNMENT, load_tensors, save_tensors
from moonlight.errors import UserError

FULL_TENSORS = {
    "experts": torch.arange(6 * 4 * 5.0).view(6, 4, 5),
    "matrix": torch.arange(7 * 3.0).view(7, 3) + 1000,
    "bias": torch.arange(5.0) + 2000,
    "last stage": torch.arange(4.0).view(2, 2) + 3000,
}


def rows(key, *ranges):
    """Return `ranges` of rows of a full tensor as (offset, values)."""
    full = FULL_TENSORS[key]
    return [((start,) + (0,) * (full.dim() - 1), full[start:stop].clone()) for start, stop in ranges]


THREE_RANKS = [
    {"experts": [(0, 1), (4, 6)], "matrix": [(0, 5)], "bias": [(0, 5)]},
    {"experts": [], "matrix": [(5, 5), (5, 6)], "bias": [(0, 5)]},
    {"experts": [(1, 4)], "matrix": [(6, 7)], "bias": [(0, 5)], "last stage": [(0, 2)]},
]
TWO_RANKS = [
    {"experts": [(0, 2), (2, 3)], "matrix": [(0, 2), (6, 7)], "last stage": [(1, 2), (0, 1)]},
    {"experts": [(3, 6)], "matrix": [(2, 6)], "bias": [(1, 2), (0, 1), (2, 5)]},
]
ONE_RANK = [{key: [(0, len(full))] for key, full in FULL_TENSORS.items()}]


def local_state(rank_splits, rank):
    return {
        key: LocalChunks(tuple(FULL_TENSORS[key].shape), rows(key, *ranges))
        for key, ranges in rank_splits[rank].items()
    }


def save_split(folder, rank_splits):
    save_tensors(folder, local_state(rank_splits, parallel.rank()))


def load_split(folder, rank_splits):
    """Load into zeroed chunks, and return what this rank's chunks hold."""
    state = local_state(rank_splits, parallel.rank())
    tensors = [(key, values) for key, chunks in state.items() for _, values in chunks.chunks]
    for _, values in tensors:
        values.zero_()
    load_tensors(folder, state)
    return [(key, values.numpy()) for key, values in tensors]


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory):
    """A checkpoint of three ranks with uneven chunks."""
    folder = tmp_path_factory.mktemp("three")
    pool.run(3, save_split, folder, THREE_RANKS)
    return folder


@pytest.mark.parametrize("rank_splits", [THREE_RANKS, TWO_RANKS, ONE_RANK], ids=["three", "two", "one"])
def test_other_ranks_read_what_three_wrote(pool, saved, rank_splits):
    for rank, answer in enumerate(pool.run(len(rank_splits), load_split, saved, rank_splits)):
        expected = [
            (key, values) for key, chunks in local_state(rank_splits, rank).items() for _, values in chunks.chunks
        ]
        assert [key for key, _ in answer] == [key for key, _ in expected]
        for (key, values), (_, full) in zip(answer, expected, strict=True):
            assert torch.equal(torch.from_numpy(values), full), key


def test_replicas_are_written_once(saved):
    index = pickle.loads((saved / ".metadata").read_bytes())
    assert [list(chunk.offsets) for chunk in index.state_dict_metadata["bias"].chunks] == [[0]]
    assert len(index.storage_data) == 3 + 3 + 1 + 1
    in_files = sum(path.stat().st_size for path in saved.glob("*.distcp"))
    lengths = [location.length for location in index.storage_data.values()]
    assert sum(lengths) <= in_files < sum(lengths) + TENSOR_ALIGNMENT * len(lengths)
    assert all(location.offset % TENSOR_ALIGNMENT == 0 for location in index.storage_data.values())


def test_elements_that_no_rank_holds_are_an_error(pool, tmp_path):
    for rank_splits in ([{"matrix": [(0, 5)]}], [{"matrix": [(0, 5)]}, {"matrix": [(6, 7)]}]):
        with pytest.raises(RuntimeError, match="matrix"):
            pool.run(len(rank_splits), save_split, tmp_path / str(len(rank_splits)), rank_splits)


def load_error(folder, rank_splits, shape):
    """Return the error of loading on this rank."""
    state = local_state(rank_splits, parallel.rank())
    if shape is not None:
        state["matrix"] = LocalChunks(shape, [])
    try:
        load_tensors(folder, state)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("mismatch", ["missing", "unknown", "shape"])
def test_mismatched_tensors_are_named(pool, saved, tmp_path, mismatch):
    """The error must be the same on both ranks, although only one has the mismatch."""
    rank_splits, shape = TWO_RANKS, None
    if mismatch == "missing":
        saved = tmp_path
        pool.run(1, save_split, tmp_path, [{key: ranges for key, ranges in ONE_RANK[0].items() if key != "bias"}])
        words = f"checkpoint {saved} lacks bias, which the run needs"
    elif mismatch == "unknown":
        rank_splits = [{key: ranges for key, ranges in split.items() if key != "last stage"} for split in TWO_RANKS]
        words = f"checkpoint {saved} holds last stage, which the run does not have"
    else:
        shape = (7, 4)
        words = f"checkpoint {saved} holds matrix with shape (7, 3), the run has (7, 4)"
    first, second = pool.run(2, load_error, saved, rank_splits, shape)
    assert first == second and words in first


@st.composite
def split_tensors(draw):
    """Draw a full shape of one to three dimensions, and two ways to split it repeatedly."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))

    def split(offset, size, depth):
        axis = draw(st.integers(0, len(size) - 1))
        if depth == 0 or size[axis] == 1:
            return [(offset, size)]
        position = draw(st.integers(1, size[axis] - 1))
        first, second = list(size), list(size)
        first[axis], second[axis] = position, size[axis] - position
        second_offset = list(offset)
        second_offset[axis] += position
        return split(offset, tuple(first), depth - 1) + split(tuple(second_offset), tuple(second), depth - 1)

    return shape, [split((0,) * len(shape), shape, draw(st.integers(0, 3))) for _ in range(2)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(split_tensors(), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_any_split_reads_any_other(single_process, tmp_path_factory, tensors, random):
    folder = tmp_path_factory.mktemp("cuts")
    full_tensors = [torch.arange(float(math.prod(shape))).view(shape) for shape, _ in tensors]

    def chunks(which, sources):
        """Return views of `sources` in any order."""
        state = {}
        for index, (shape, rank_splits) in enumerate(tensors):
            tensor_chunks = [
                (offset, sources[index][tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))])
                for offset, size in rank_splits[which]
            ]
            random.shuffle(tensor_chunks)
            state[str(index)] = LocalChunks(shape, tensor_chunks)
        return state

    save_tensors(folder, chunks(0, full_tensors))
    filled = [torch.full_like(full, -1) for full in full_tensors]
    load_tensors(folder, chunks(1, filled))
    for full, other in zip(full_tensors, filled, strict=True):
        assert torch.equal(full, other)
