"""Which source, and which sample of it, is sample n of a run: a function of the seed, the weights and n alone.

Neither data-parallel size nor batch nor length of the run has a part in it, and no sample needs those before it. Every
stage is cut into blocks of `BLOCK` samples. How many of the first blocks' samples a source has is a closed form, so its
share is exact at every block's end; their order inside a block is shuffled.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from moonlight.config.run import RunConfig

BLOCK = 1024
"""Samples whose order is shuffled together. Another value is another order of every mixture."""

_TAG = 0x6D6978
"""Keeps these random numbers apart from those of the sources' own orders."""


class SourceMixture:
    """Samples of a run, dealt out among its sources. Counts of a source go on from stage to stage."""

    def __init__(self, sources: Sequence[str], stages: Sequence[tuple[int, Mapping[str, float]]], seed: int) -> None:
        """`stages` are (first sample, weights by source), the first from 0; a source without a weight has none."""
        assert stages[0][0] == 0, stages
        self.sources = tuple(sorted(sources))  # the order in which a recipe names them means nothing
        self.seed = seed
        self._firsts = [first for first, _ in stages]
        self._rates = [_rates([Fraction(str(weights.get(name, 0))) for name in self.sources]) for _, weights in stages]
        self._block = lru_cache(maxsize=4)(self._deal)
        self._before = [np.zeros(len(self.sources), dtype=np.int64)]
        for stage in range(len(stages) - 1):
            length = self._firsts[stage + 1] - self._firsts[stage]
            self._before.append(self._before[stage] + self._within(stage, length))

    def __getitem__(self, index: int) -> tuple[str, int]:
        """Source of sample `number`, and its number among the samples of that source, both counted from 0."""
        stage = bisect_right(self._firsts, index) - 1
        block, place = divmod(index - self._firsts[stage], BLOCK)
        sources, numbers = self._block(stage, block)
        source = int(sources[place])
        return self.sources[source], int(self._before[stage][source]) + int(numbers[place])

    def counts(self, num_samples: int) -> dict[str, int]:
        """Samples of each source among the first `number`."""
        stage = bisect_right(self._firsts, num_samples) - 1
        found = self._before[stage] + self._within(stage, num_samples - self._firsts[stage])
        return dict(zip(self.sources, found.tolist(), strict=True))

    def _within(self, stage: int, length: int) -> np.ndarray:
        """Samples of each source among the first `length` of a stage, int64."""
        block, rest = divmod(length, BLOCK)
        found = np.array(_portions(self._rates[stage], block * BLOCK), dtype=np.int64)
        if rest:
            found += np.bincount(self._block(stage, block)[0][:rest], minlength=len(self.sources))
        return found

    def _deal(self, stage: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of every sample of a block: number of its source, and its number among those of the source in the stage."""
        before, after = (_portions(self._rates[stage], (block + more) * BLOCK) for more in (0, 1))
        each = np.subtract(after, before)
        sources = np.repeat(np.arange(len(each), dtype=np.int32), each)
        np.random.Generator(np.random.PCG64([self.seed, stage, block, _TAG])).shuffle(sources)
        numbers = np.empty(BLOCK, dtype=np.int64)
        for source, (first, stop) in enumerate(zip(before, after, strict=True)):
            numbers[sources == source] = np.arange(first, stop)
        return sources, numbers


def _rates(weights: Sequence[Fraction]) -> list[Fraction]:
    """Share of each source in what the sources before it leave."""
    rest, rates = sum(weights, Fraction(0)), []
    for weight in weights:
        rates.append(weight / rest if rest else Fraction(0))
        rest -= weight
    return rates


def _portions(rates: Sequence[Fraction], total: int) -> list[int]:
    """How many of `total` samples each source has: they add up to it, and none shrinks as it grows."""
    portions = []
    for rate in rates:
        portions.append(rate.numerator * total // rate.denominator)
        total -= portions[-1]
    assert total == 0, rates
    return portions


def build_mixture(config: RunConfig) -> SourceMixture:
    """The mixture of a recipe, over all of its stages."""
    own = {name: source.weight for name, source in config.data.mixture.items()}
    length = config.data.sequence_length
    stages = [(-(-stage.from_tokens // length), stage.weights or own) for stage in config.stages.values()]
    return SourceMixture(tuple(own), stages or [(0, own)], config.train.seed)


def samples_per_epoch(num_tokens: int, sequence_length: int) -> int:
    """Windows that documents of `num_tokens` in all are cut into: each needs the token after it for its last label."""
    return (num_tokens - 1) // sequence_length
