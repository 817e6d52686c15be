"""Token windows for training and validation: what a sample holds is a function of the seed and its number alone."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from moonlight.config.run import RunConfig
from moonlight.data.index_cache import EpochOrder, IndexCache
from moonlight.data.mixture import SourceMixture, build_mixture, samples_per_epoch
from moonlight.errors import UserError


class PackedSample(NamedTuple):
    """A sequence of whole conversations, and padding after them."""

    tokens: np.ndarray
    """int64 [sequence_length + 1]."""
    mask: np.ndarray
    """float32 [sequence_length]: which of the last sequence_length tokens count as labels."""
    documents: np.ndarray
    """int32 [sequence_length]: number of each token's conversation; padding is one more."""


Sample = tuple[np.ndarray, np.ndarray] | PackedSample
"""Tokens [sequence_length + 1] int64, and which of the last sequence_length count as labels, float32."""


class _Stream:
    """The documents of one split, joined in a given order, read by position."""

    def __init__(self, prefix: Path) -> None:
        hint = "make the folder with `moonlight data prepare` again"
        try:
            self.dataset = IndexedDataset(str(prefix))
        except (AssertionError, ValueError, KeyError):
            raise UserError(f"data {prefix}.idx is damaged: {hint}") from None
        index = self.dataset.index
        self.lengths: np.ndarray = index.sequence_lengths
        self.starts: np.ndarray = index.sequence_pointers  # in bytes
        # A plain array: slices of numpy.memmap cost a microsecond each.
        self.tokens = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r").view(np.ndarray)
        self.num_tokens = int(self.lengths.sum(dtype=np.int64))
        if self.num_tokens != len(self.tokens):
            raise UserError(
                f"data {prefix}.idx counts {self.num_tokens} tokens, {prefix}.bin has {len(self.tokens)}: {hint}"
            )

    def read(self, order: np.ndarray | None, ends: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the documents in `order` (None: as stored); `ends` are their running totals."""
        # Bounds of another type than `ends` would have numpy convert all of it.
        first, last = np.searchsorted(ends, np.array([start, stop - 1], dtype=ends.dtype), side="right").tolist()
        places = slice(first, last + 1) if order is None else order[first : last + 1]
        lengths = self.lengths[places].tolist()
        starts = (self.starts[places] // self.tokens.itemsize).tolist()
        pieces = [self.tokens[begin : begin + length] for begin, length in zip(starts, lengths, strict=True)]
        pieces[-1] = pieces[-1][: lengths[-1] - (int(ends[last]) - stop)]
        pieces[0] = pieces[0][start - (int(ends[first]) - lengths[0]) :]
        return np.concatenate(pieces, dtype=np.int64)


class TrainDataset:
    """Endless samples: every epoch shuffles the documents, joins them, cuts windows, and shuffles those.

    Neighbouring windows share one token, so each token but the first of an epoch is a label once.
    """

    def __init__(self, folder: Path, sequence_length: int, seed: int, cache: IndexCache | None = None) -> None:
        """`cache` keeps the orders of epochs on disk; without one each process has its own in memory."""
        self.stream = _Stream(folder / "train")
        self.sequence_length, self.seed, self.cache = sequence_length, seed, cache
        self.samples_per_epoch = samples_per_epoch(self.stream.num_tokens, sequence_length)
        if self.samples_per_epoch < 1:
            raise UserError(
                f"{folder} has {self.stream.num_tokens} training tokens: too few for one sequence of "
                f"data.sequence_length {sequence_length} and the token after it"
            )
        self._epoch = lru_cache(maxsize=2)(self._order)
        self._mask = np.ones(sequence_length, dtype=np.float32)
        self._mask.flags.writeable = False  # all samples have this one

    def _order(self, epoch: int) -> EpochOrder:
        if self.cache is None:
            return self._shuffle(epoch)
        return self.cache.order(epoch, lambda: self._shuffle(epoch))

    def _shuffle(self, epoch: int) -> EpochOrder:
        """The order of an epoch, in the smallest integers that hold it: they do not change what is drawn."""
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        documents = _count_up(len(self.stream.lengths))
        generator.shuffle(documents)
        total = np.uint32 if self.stream.num_tokens < 2**32 else np.int64
        ends = np.cumsum(self.stream.lengths[documents], dtype=total)
        windows = _count_up(self.samples_per_epoch)
        generator.shuffle(windows)
        return EpochOrder(documents, ends, windows)

    def __getitem__(self, index: int) -> Sample:
        """Sample `number`, counted from 0 over the whole run."""
        epoch, place = divmod(index, self.samples_per_epoch)
        order = self._epoch(epoch)
        start = int(order.windows[place]) * self.sequence_length
        tokens = self.stream.read(order.documents, order.ends, start, start + self.sequence_length + 1)
        return tokens, self._mask


def _count_up(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)


class _Conversations:
    """The windows of one split of prepared conversations, as they were packed."""

    def __init__(self, prefix: Path, sequence_length: int, eos_id: int) -> None:
        self.stream = _Stream(prefix)
        self.sequence_length, self.eos_id = sequence_length, eos_id
        self._learnt = np.memmap(f"{prefix}.mask", dtype=np.uint8, mode="r").view(np.ndarray)
        self._firsts = self.stream.dataset.index.document_indices
        self._ends = np.cumsum(self.stream.lengths, dtype=np.int64)

    @property
    def num_windows(self) -> int:
        return len(self._firsts) - 1

    def window(self, index: int) -> PackedSample:
        """Window `number`; one past the last is all padding."""
        length = self.sequence_length
        tokens = np.full(length + 1, self.eos_id, dtype=np.int64)
        mask, documents = np.zeros(length, dtype=np.float32), np.zeros(length, dtype=np.int32)
        if index < self.num_windows:
            first, last = int(self._firsts[index]), int(self._firsts[index + 1])
            lengths = self.stream.lengths[first:last]
            stop = int(self._ends[last - 1])
            start, count = stop - int(lengths.sum()), int(lengths.sum())
            tokens[:count] = self.stream.tokens[start:stop]
            mask[: count - 1] = self._learnt[start + 1 : stop]
            documents[:count] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
            documents[count:] = len(lengths)
        return PackedSample(tokens, mask, documents)


class ChatTrainDataset(_Conversations):
    """Endless samples of conversations: every epoch shuffles the windows."""

    def __init__(self, folder: Path, sequence_length: int, eos_id: int, seed: int) -> None:
        super().__init__(folder / "train", sequence_length, eos_id)
        self.seed = seed
        self._epoch = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        windows = _count_up(self.num_windows)
        np.random.Generator(np.random.PCG64([self.seed, epoch])).shuffle(windows)
        return windows

    def __getitem__(self, index: int) -> PackedSample:
        """Sample `number`, counted from 0 over the whole run."""
        epoch, place = divmod(index, self.num_windows)
        return self.window(int(self._epoch(epoch)[place]))


class ChatValDataset(_Conversations):
    """Held-out conversations in order; samples past the last are all padding."""

    def __init__(self, folder: Path, sequence_length: int, eos_id: int) -> None:
        super().__init__(folder / "validation", sequence_length, eos_id)

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: int) -> PackedSample:
        return self.window(index)


class MixtureDataset:
    """The samples of a run: those of its sources, mixed."""

    def __init__(self, mixture: SourceMixture, sources: Mapping[str, TrainDataset | ChatTrainDataset]) -> None:
        self.mixture, self.sources = mixture, sources

    def __getitem__(self, index: int) -> Sample:
        """Sample `number`, counted from 0 over the whole run."""
        source, own = self.mixture[index]
        return self.sources[source][own]

    def tokens_read(self, num_samples: int) -> dict[str, int]:
        """Metrics: tokens of each source among the first `number` samples; nothing where there is one source only."""
        if len(self.sources) == 1:
            return {}
        counts = self.mixture.counts(num_samples)
        return {f"data/tokens/{name}": counts[name] * source.sequence_length for name, source in self.sources.items()}


def build_train_dataset(
    config: RunConfig, manifests: Mapping[str, dict[str, Any]], cache_folder: Path
) -> MixtureDataset:
    """The training samples of a run whose sources have these manifests; orders of epochs lie in `cache_folder`."""
    length, seed = config.data.sequence_length, config.train.seed
    sources: dict[str, TrainDataset | ChatTrainDataset] = {}
    for name, source in config.data.mixture.items():
        if config.data.conversations:
            eos_id = manifests[name]["tokenizer"]["eos_id"]
            sources[name] = ChatTrainDataset(Path(source.path), length, eos_id, seed)
            continue
        index = manifests[name]["splits"]["train"]["idx_sha256"]
        cache = IndexCache(cache_folder, {"idx_sha256": index, "sequence_length": length, "seed": seed})
        sources[name] = TrainDataset(Path(source.path), length, seed, cache)
    return MixtureDataset(build_mixture(config), sources)


def build_val_datasets(config: RunConfig, manifests: Mapping[str, dict[str, Any]]) -> dict[str, "AnyValDataset"]:
    """The held-out samples of each source."""
    kind = ChatValDataset if config.data.conversations else ValDataset
    return {
        name: kind(Path(source.path), config.data.sequence_length, manifests[name]["tokenizer"]["eos_id"])
        for name, source in config.data.mixture.items()
    }


class ValDataset:
    """Every token of the held-out documents as a label exactly once, in order.

    The first token of all is predicted from `eos_id`, as every later document's first is. The last window is padded,
    its padding does not count; samples past the last are all padding, so that ranks can have equal shares.
    """

    def __init__(self, folder: Path, sequence_length: int, eos_id: int) -> None:
        self.stream = _Stream(folder / "validation")
        self.sequence_length, self.eos_id = sequence_length, eos_id
        self.ends = np.cumsum(self.stream.lengths, dtype=np.int64)

    def __len__(self) -> int:
        return -(-self.stream.num_tokens // self.sequence_length)

    def __getitem__(self, index: int) -> Sample:
        length = self.sequence_length
        start = index * length
        stop = max(start, min(start + length, self.stream.num_tokens))
        tokens = np.full(length + 1, self.eos_id, dtype=np.int64)
        mask = np.zeros(length, dtype=np.float32)
        if stop > start:
            first = max(start - 1, 0)
            known = self.stream.read(None, self.ends, first, stop)
            tokens[1 - (start - first) : 1 + stop - start] = known
            mask[: stop - start] = 1
        return tokens, mask


AnyValDataset = ValDataset | ChatValDataset


def collate(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens and labels, int64, and loss mask, float32, all [samples, sequence_length]."""
    shape = len(samples), len(samples[0][1])
    tokens, labels = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
    for row, sample in enumerate(samples):
        tokens[row], labels[row] = sample[0][:-1], sample[0][1:]
    mask = np.stack([sample[1] for sample in samples])
    return torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(mask)
