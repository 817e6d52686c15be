"""Mixture of sources: maps sample n of a run to a source and a sample of it.

The mapping is a function of the seed, the weights and n alone. It does not depend on the data-parallel size, the batch
size, the length of the run or earlier samples. Every stage is split into blocks of `BLOCK` samples. A closed form gives
the number of samples of each source up to the end of each block, so every block has the exact proportions. The order
within a block is shuffled.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from moonlight.config.run import RunConfig

BLOCK = 1024
"""Number of samples that are shuffled together. Another value changes the order of every mixture."""

_TAG = 0x6D6978
"""Part of the seed that separates these random numbers from those of the epoch orders."""


class SourceMixture:
    """Assignment of a run's samples to its sources. Counts of a source continue from stage to stage."""

    def __init__(self, sources: Sequence[str], stages: Sequence[tuple[int, Mapping[str, float]]], seed: int) -> None:
        """`stages` are (first sample, weights by source); the first starts at 0. A missing weight is 0."""
        assert stages[0][0] == 0, stages
        self.sources = tuple(sorted(sources))  # independent of their order in the recipe
        self.seed = seed
        self._starts = [start for start, _ in stages]
        self._rates = [_rates([Fraction(str(weights.get(name, 0))) for name in self.sources]) for _, weights in stages]
        self._block = lru_cache(maxsize=4)(self._assign)
        self._before = [np.zeros(len(self.sources), dtype=np.int64)]
        for stage in range(len(stages) - 1):
            length = self._starts[stage + 1] - self._starts[stage]
            self._before.append(self._before[stage] + self._within(stage, length))

    def __getitem__(self, index: int) -> tuple[str, int]:
        """Return the source of sample `index`, and its index in the samples of that source; both count from 0."""
        stage = bisect_right(self._starts, index) - 1
        block, position = divmod(index - self._starts[stage], BLOCK)
        sources, indices = self._block(stage, block)
        source = int(sources[position])
        return self.sources[source], int(self._before[stage][source]) + int(indices[position])

    def counts(self, num_samples: int) -> dict[str, int]:
        """Return the number of samples of each source in the first `num_samples`."""
        stage = bisect_right(self._starts, num_samples) - 1
        counts = self._before[stage] + self._within(stage, num_samples - self._starts[stage])
        return dict(zip(self.sources, counts.tolist(), strict=True))

    def _within(self, stage: int, length: int) -> np.ndarray:
        """Return the number of samples of each source in the first `length` of a stage: int64 [sources]."""
        block, remainder = divmod(length, BLOCK)
        counts = np.array(_portions(self._rates[stage], block * BLOCK), dtype=np.int64)
        if remainder:
            counts += np.bincount(self._block(stage, block)[0][:remainder], minlength=len(self.sources))
        return counts

    def _assign(self, stage: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the index of the source of each sample of a block, and the sample's index in that source and stage."""
        before, after = (_portions(self._rates[stage], (block + offset) * BLOCK) for offset in (0, 1))
        counts = np.subtract(after, before)
        sources = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        np.random.Generator(np.random.PCG64([self.seed, stage, block, _TAG])).shuffle(sources)
        indices = np.empty(BLOCK, dtype=np.int64)
        for source, (start, stop) in enumerate(zip(before, after, strict=True)):
            indices[sources == source] = np.arange(start, stop)
        return sources, indices


def _rates(weights: Sequence[Fraction]) -> list[Fraction]:
    """Return the weight of each source as a fraction of its weight and all later weights."""
    remaining, rates = sum(weights, Fraction(0)), []
    for weight in weights:
        rates.append(weight / remaining if remaining else Fraction(0))
        remaining -= weight
    return rates


def _portions(rates: Sequence[Fraction], total: int) -> list[int]:
    """Return the number of samples of each source: they sum to `total`, and none decreases as `total` increases."""
    portions = []
    for rate in rates:
        portions.append(rate.numerator * total // rate.denominator)
        total -= portions[-1]
    assert total == 0, rates
    return portions


def build_mixture(config: RunConfig) -> SourceMixture:
    """Return the mixture of a run, over all of its stages."""
    weights = {name: source.weight for name, source in config.data.mixture.items()}
    length = config.data.sequence_length
    stages = [(-(-stage.from_tokens // length), stage.weights or weights) for stage in config.stages.values()]
    return SourceMixture(tuple(weights), stages or [(0, weights)], config.train.seed)


def samples_per_epoch(num_tokens: int, sequence_length: int) -> int:
    """Return the number of windows in `num_tokens` tokens. The last label of a window is the token after it."""
    return (num_tokens - 1) // sequence_length
