"""Whole tensors in rectangles of any cut: written by one world, read by another."""

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

WHOLES = {
    "experts": torch.arange(6 * 4 * 5.0).view(6, 4, 5),
    "matrix": torch.arange(7 * 3.0).view(7, 3) + 1000,
    "bias": torch.arange(5.0) + 2000,
    "last stage": torch.arange(4.0).view(2, 2) + 3000,
}


def rows(key, *ranges):
    """`ranges` of rows of a whole tensor as (offset, values)."""
    whole = WHOLES[key]
    return [((low,) + (0,) * (whole.dim() - 1), whole[low:high].clone()) for low, high in ranges]


THREE_RANKS = [
    {"experts": [(0, 1), (4, 6)], "matrix": [(0, 5)], "bias": [(0, 5)]},
    {"experts": [], "matrix": [(5, 5), (5, 6)], "bias": [(0, 5)]},
    {"experts": [(1, 4)], "matrix": [(6, 7)], "bias": [(0, 5)], "last stage": [(0, 2)]},
]
TWO_RANKS = [
    {"experts": [(0, 2), (2, 3)], "matrix": [(0, 2), (6, 7)], "last stage": [(1, 2), (0, 1)]},
    {"experts": [(3, 6)], "matrix": [(2, 6)], "bias": [(1, 2), (0, 1), (2, 5)]},
]
ONE_RANK = [{key: [(0, len(whole))] for key, whole in WHOLES.items()}]


def held(cuts, rank):
    return {key: LocalChunks(tuple(WHOLES[key].shape), rows(key, *ranges)) for key, ranges in cuts[rank].items()}


def save_cuts(folder, cuts):
    save_tensors(folder, held(cuts, parallel.rank()))


def load_cuts(folder, cuts):
    """What this rank's rectangles hold after loading, which zeros were in before."""
    state = held(cuts, parallel.rank())
    tensors = [(key, values) for key, pieces in state.items() for _, values in pieces.chunks]
    for _, values in tensors:
        values.zero_()
    load_tensors(folder, state)
    return [(key, values.numpy()) for key, values in tensors]


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory):
    """A checkpoint of three ranks with uneven cuts."""
    folder = tmp_path_factory.mktemp("three")
    pool.run(3, save_cuts, folder, THREE_RANKS)
    return folder


@pytest.mark.parametrize("cuts", [THREE_RANKS, TWO_RANKS, ONE_RANK], ids=["three", "two", "one"])
def test_other_ranks_read_what_three_wrote(pool, saved, cuts):
    for rank, answer in enumerate(pool.run(len(cuts), load_cuts, saved, cuts)):
        expected = [(key, values) for key, pieces in held(cuts, rank).items() for _, values in pieces.chunks]
        assert [key for key, _ in answer] == [key for key, _ in expected]
        for (key, values), (_, whole) in zip(answer, expected, strict=True):
            assert torch.equal(torch.from_numpy(values), whole), key


def test_replicas_are_written_once(saved):
    index = pickle.loads((saved / ".metadata").read_bytes())
    assert [list(chunk.offsets) for chunk in index.state_dict_metadata["bias"].chunks] == [[0]]
    assert len(index.storage_data) == 3 + 3 + 1 + 1
    in_files = sum(path.stat().st_size for path in saved.glob("*.distcp"))
    lengths = [place.length for place in index.storage_data.values()]
    assert sum(lengths) <= in_files < sum(lengths) + TENSOR_ALIGNMENT * len(lengths)
    assert all(place.offset % TENSOR_ALIGNMENT == 0 for place in index.storage_data.values())


def test_elements_that_no_rank_holds(pool, tmp_path):
    for cuts in ([{"matrix": [(0, 5)]}], [{"matrix": [(0, 5)]}, {"matrix": [(6, 7)]}]):
        with pytest.raises(RuntimeError, match="matrix"):
            pool.run(len(cuts), save_cuts, tmp_path / str(len(cuts)), cuts)


def refused(folder, rank_cuts, shape):
    """The error of each rank, which must be the same on all."""
    state = held(rank_cuts, parallel.rank())
    if shape is not None:
        state["matrix"] = LocalChunks(shape, [])
    try:
        load_tensors(folder, state)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("wrong", ["missing", "unknown", "shape"])
def test_other_tensors_are_named(pool, saved, tmp_path, wrong):
    """Each is wrong on one rank only."""
    cuts, shape = TWO_RANKS, None
    if wrong == "missing":
        saved = tmp_path
        pool.run(1, save_cuts, tmp_path, [{key: ranges for key, ranges in ONE_RANK[0].items() if key != "bias"}])
        words = f"checkpoint {saved} lacks bias, which the run needs"
    elif wrong == "unknown":
        cuts = [{key: ranges for key, ranges in cut.items() if key != "last stage"} for cut in TWO_RANKS]
        words = f"checkpoint {saved} holds last stage, which the run does not have"
    else:
        shape = (7, 4)
        words = f"checkpoint {saved} holds matrix with shape (7, 3), the run has (7, 4)"
    first, second = pool.run(2, refused, saved, cuts, shape)
    assert first == second and words in first


@pytest.fixture
def alone():
    parallel.init_single_process()
    yield
    parallel.destroy_distributed()


@st.composite
def cut_tensors(draw):
    """A whole shape of one to three dimensions, and two ways to cut it by repeated splitting."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))

    def cut(offset, size, splits):
        axis = draw(st.integers(0, len(size) - 1))
        if splits == 0 or size[axis] == 1:
            return [(offset, size)]
        at = draw(st.integers(1, size[axis] - 1))
        low, high = list(size), list(size)
        low[axis], high[axis] = at, size[axis] - at
        beyond = list(offset)
        beyond[axis] += at
        return cut(offset, tuple(low), splits - 1) + cut(tuple(beyond), tuple(high), splits - 1)

    return shape, [cut((0,) * len(shape), shape, draw(st.integers(0, 3))) for _ in range(2)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(cut_tensors(), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_any_cut_reads_any_other(alone, tmp_path_factory, tensors, random):
    folder = tmp_path_factory.mktemp("cuts")
    wholes = [torch.arange(float(math.prod(shape))).view(shape) for shape, _ in tensors]

    def pieces(which, sources):
        """Views of `sources`, in any order."""
        state = {}
        for number, (shape, cuts) in enumerate(tensors):
            rectangles = [
                (offset, sources[number][tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))])
                for offset, size in cuts[which]
            ]
            random.shuffle(rectangles)
            state[str(number)] = LocalChunks(shape, rectangles)
        return state

    save_tensors(folder, pieces(0, wholes))
    filled = [torch.full_like(whole, -1) for whole in wholes]
    load_tensors(folder, pieces(1, filled))
    for whole, other in zip(wholes, filled, strict=True):
        assert torch.equal(whole, other)
