"""Which sample of which source is sample n: against a slow twin that deals them out one by one."""

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moonlight.data.mixture import BLOCK, SourceMixture

WEIGHTS = st.one_of(st.sampled_from([0.0, 1e-4, 0.1, 0.3, 1.0, 1 / 3]), st.floats(1e-3, 10))


def deal(weights, count):
    """Sources of `count` samples in turn: each passes on what exceeds its share of what the ones before left."""
    offered, dealt = [0] * len(weights), []
    for _ in range(count):
        for source, weight in enumerate(weights):
            rest = sum(weights[source:])
            offered[source] += 1
            rate = weight / rest if rest else 0
            if int(rate * offered[source]) > int(rate * (offered[source] - 1)):
                dealt.append(source)
                break
    return dealt


@st.composite
def mixtures(draw):
    names = [f"s{number}" for number in range(draw(st.integers(1, 5)))]
    firsts = [0, *sorted(draw(st.lists(st.integers(1, 3 * BLOCK), max_size=2)))]
    stages = []
    for first in firsts:
        weights = draw(st.dictionaries(st.sampled_from(names), WEIGHTS, min_size=1))
        if not sum(weights.values()):
            weights[names[0]] = 1.0
        stages.append((first, weights))
    return names, stages, draw(st.integers(0, 2**31 - 1))


@settings(max_examples=25, deadline=None)
@given(mixtures(), st.integers(1, 3 * BLOCK))
def test_every_sample_equals_the_slow_twin(arguments, last):
    names, stages, seed = arguments
    mixture = SourceMixture(names, stages, seed)
    total = stages[-1][0] + BLOCK + last % BLOCK
    counts = Counter()
    found = []
    for number in range(total):
        assert number % 97 or mixture.counts(number) == {name: counts[name] for name in names}
        source, own = mixture[number]
        assert own == counts[source]  # no sample twice, none left out, from stage to stage
        counts[source] += 1
        found.append(source)
    assert mixture.counts(total) == {name: counts[name] for name in names}

    for (first, weights), stop in zip(stages, [*(first for first, _ in stages[1:]), total], strict=True):
        dealt = deal([Fraction(str(weights.get(name, 0))) for name in names], stop - first)
        for start in range(0, stop - first - BLOCK + 1, BLOCK):
            expected = Counter(names[source] for source in dealt[start : start + BLOCK])
            assert Counter(found[first + start : first + start + BLOCK]) == expected

    other = SourceMixture(names[::-1], stages, seed)
    assert other[last] == mixture[last]  # without those before, whatever order the sources are named in
    longer = SourceMixture(names, [*stages, (total, {names[0]: 1.0})], seed)
    assert [longer[number] for number in range(total)] == [mixture[number] for number in range(total)]
    assert longer[total + 5] == (names[0], counts[names[0]] + 5)


def test_shares_are_exact_however_far():
    weights = {"a": 0.6, "b": 0.2, "c": 0.2, "rare": 1e-7}
    mixture = SourceMixture(list(weights), [(0, weights)], 1)
    for number in (10**6, 10**9 + 7, 700_000_003):
        counts = mixture.counts(number)
        assert sum(counts.values()) == number
        for name, weight in weights.items():
            assert abs(counts[name] - number * weight / sum(weights.values())) <= BLOCK
        whole = mixture.counts(number // BLOCK * BLOCK)
        for name, weight in weights.items():
            assert abs(whole[name] - number // BLOCK * BLOCK * weight / sum(weights.values())) < len(weights)


def test_blocks_are_shuffled_by_seed_and_stage():
    stages = [(0, {"a": 1, "b": 1}), (BLOCK, {"a": 1, "b": 1})]
    sources = [[SourceMixture("ab", stages, seed)[number][0] for number in range(3 * BLOCK)] for seed in (1, 2)]
    assert sources[0] != sources[1]
    blocks = [tuple(sources[0][start : start + BLOCK]) for start in range(0, 3 * BLOCK, BLOCK)]
    assert len(set(blocks)) == 3
    for block in blocks:
        assert Counter(block) == {"a": BLOCK // 2, "b": BLOCK // 2}
        changes = sum(one != other for one, other in pairwise(block))
        assert changes == pytest.approx(BLOCK / 2, rel=0.2)  # neither sorted nor alternating


def test_one_source_is_read_in_its_own_order():
    mixture = SourceMixture(["only"], [(0, {"only": 0.3})], 9)
    assert [mixture[number] for number in (0, 5, 3000)] == [("only", 0), ("only", 5), ("only", 3000)]
