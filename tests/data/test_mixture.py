"""The source and source sample of each mixture sample equal a slow reference that assigns them one by one."""

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moonlight.data.mixture import BLOCK, SourceMixture

WEIGHTS = st.one_of(st.sampled_from([0.0, 1e-4, 0.1, 0.3, 1.0, 1 / 3]), st.floats(1e-3, 10))


def assign_sources(weights, count):
    """Return the sources of `count` samples. Each takes its fraction of what earlier ones left."""
    offered, assigned = [0] * len(weights), []
    for _ in range(count):
        for source, weight in enumerate(weights):
            rest = sum(weights[source:])
            offered[source] += 1
            rate = weight / rest if rest else 0
            if int(rate * offered[source]) > int(rate * (offered[source] - 1)):
                assigned.append(source)
                break
    return assigned


@st.composite
def mixtures(draw):
    names = [f"s{index}" for index in range(draw(st.integers(1, 5)))]
    starts = [0, *sorted(draw(st.lists(st.integers(1, 3 * BLOCK), max_size=2)))]
    stages = []
    for start in starts:
        weights = draw(st.dictionaries(st.sampled_from(names), WEIGHTS, min_size=1))
        if not sum(weights.values()):
            weights[names[0]] = 1.0
        stages.append((start, weights))
    return names, stages, draw(st.integers(0, 2**31 - 1))


@settings(max_examples=25, deadline=None)
@given(mixtures(), st.integers(1, 3 * BLOCK))
def test_every_sample_equals_a_slow_reference(arguments, last):
    names, stages, seed = arguments
    mixture = SourceMixture(names, stages, seed)
    total = stages[-1][0] + BLOCK + last % BLOCK
    counts = Counter()
    sources = []
    for index in range(total):
        assert index % 97 or mixture.counts(index) == {name: counts[name] for name in names}
        source, sample = mixture[index]
        assert sample == counts[source]  # across stages, no sample is repeated or left out
        counts[source] += 1
        sources.append(source)
    assert mixture.counts(total) == {name: counts[name] for name in names}

    for (first, weights), stop in zip(stages, [*(first for first, _ in stages[1:]), total], strict=True):
        assigned = assign_sources([Fraction(str(weights.get(name, 0))) for name in names], stop - first)
        for start in range(0, stop - first - BLOCK + 1, BLOCK):
            expected = Counter(names[source] for source in assigned[start : start + BLOCK])
            assert Counter(sources[first + start : first + start + BLOCK]) == expected

    other = SourceMixture(names[::-1], stages, seed)
    assert other[last] == mixture[last]  # independent of earlier samples and of the order of the names
    longer = SourceMixture(names, [*stages, (total, {names[0]: 1.0})], seed)
    assert [longer[index] for index in range(total)] == [mixture[index] for index in range(total)]
    assert longer[total + 5] == (names[0], counts[names[0]] + 5)


def test_fractions_are_exact_at_any_sample():
    weights = {"a": 0.6, "b": 0.2, "c": 0.2, "rare": 1e-7}
    mixture = SourceMixture(list(weights), [(0, weights)], 1)
    for index in (10**6, 10**9 + 7, 700_000_003):
        counts = mixture.counts(index)
        assert sum(counts.values()) == index
        for name, weight in weights.items():
            assert abs(counts[name] - index * weight / sum(weights.values())) <= BLOCK
        full_blocks = mixture.counts(index // BLOCK * BLOCK)
        for name, weight in weights.items():
            assert abs(full_blocks[name] - index // BLOCK * BLOCK * weight / sum(weights.values())) < len(weights)


def test_blocks_are_shuffled_by_seed_and_stage():
    stages = [(0, {"a": 1, "b": 1}), (BLOCK, {"a": 1, "b": 1})]
    sources = [[SourceMixture("ab", stages, seed)[index][0] for index in range(3 * BLOCK)] for seed in (1, 2)]
    assert sources[0] != sources[1]
    blocks = [tuple(sources[0][start : start + BLOCK]) for start in range(0, 3 * BLOCK, BLOCK)]
    assert len(set(blocks)) == 3
    for block in blocks:
        assert Counter(block) == {"a": BLOCK // 2, "b": BLOCK // 2}
        changes = sum(one != other for one, other in pairwise(block))
        assert changes == pytest.approx(BLOCK / 2, rel=0.2)  # neither sorted nor alternating


def test_a_single_source_keeps_its_order():
    mixture = SourceMixture(["only"], [(0, {"only": 0.3})], 9)
    assert [mixture[index] for index in (0, 5, 3000)] == [("only", 0), ("only", 5), ("only", 3000)]
