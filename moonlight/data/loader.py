"""Samples for training and validation. The content of a sample is a function of the seed and its index alone."""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from moonlight.config.data import DataConfig
from moonlight.config.run import RunConfig
from moonlight.data.index_cache import EpochOrder, IndexCache
from moonlight.data.mixture import SourceMixture, build_mixture, samples_per_epoch
from moonlight.errors import UserError


class PackedSample(NamedTuple):
    """A sequence of complete conversations, followed by padding."""

    tokens: np.ndarray
    """int64 [sequence_length + 1]."""
    mask: np.ndarray
    """float32 [sequence_length]: 1 where the next token counts as a label, otherwise 0."""
    document_ids: np.ndarray
    """int32 [sequence_length]: index of each token's conversation, from 0; padding has the next index."""


Sample = tuple[np.ndarray, np.ndarray] | PackedSample
"""Tokens int64 [sequence_length + 1] and loss mask float32 [sequence_length], or a `PackedSample`."""


class _TokenStream:
    """The joined documents of one split, read by token position in any order of documents."""

    def __init__(self, prefix: Path) -> None:
        hint = "make the folder again"
        try:
            self.dataset = IndexedDataset(str(prefix))
        except (AssertionError, ValueError, KeyError):
            raise UserError(f"data {prefix}.idx is corrupt: {hint}") from None
        index = self.dataset.index
        self.lengths: np.ndarray = index.sequence_lengths
        self.starts: np.ndarray = index.sequence_pointers  # in bytes
        # A plain array: slicing a numpy.memmap takes a microsecond.
        self.tokens = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r").view(np.ndarray)
        self.num_tokens = int(self.lengths.sum(dtype=np.int64))
        if self.num_tokens != len(self.tokens):
            raise UserError(
                f"data {prefix}.idx counts {self.num_tokens} tokens, {prefix}.bin has {len(self.tokens)}: {hint}"
            )

    def read(self, order: np.ndarray | None, ends: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) of the documents joined in `order`: int64 [stop - start].

        Args:
            order: indices of the documents, [documents]; None for the stored order.
            ends: cumulative sum of the documents' lengths in this order, [documents].
        """
        # If the bounds have another dtype than `ends`, numpy converts all of `ends`.
        first, last = np.searchsorted(ends, np.array([start, stop - 1], dtype=ends.dtype), side="right").tolist()
        indices = slice(first, last + 1) if order is None else order[first : last + 1]
        lengths = self.lengths[indices].tolist()
        offsets = (self.starts[indices] // self.tokens.itemsize).tolist()
        pieces = [self.tokens[offset : offset + length] for offset, length in zip(offsets, lengths, strict=True)]
        pieces[-1] = pieces[-1][: lengths[-1] - (int(ends[last]) - stop)]
        pieces[0] = pieces[0][start - (int(ends[first]) - lengths[0]) :]
        return np.concatenate(pieces, dtype=np.int64)


class TrainDataset:
    """Endless samples of text. Every epoch shuffles and joins the documents, splits them into windows, shuffles these.

    Adjacent windows overlap by one token, so each token of an epoch's windows except the first is a label once.
    """

    def __init__(self, folder: Path, sequence_length: int, seed: int, cache: IndexCache | None = None) -> None:
        """Open the training split of a data folder.

        Args:
            cache: cache of epoch orders on disk; without it each process holds its orders in memory.

        Raises:
            UserError: the files are corrupt, or have too few tokens for one sample.
        """
        self.stream = _TokenStream(folder / "train")
        self.sequence_length, self.seed, self.cache = sequence_length, seed, cache
        self.samples_per_epoch = samples_per_epoch(self.stream.num_tokens, sequence_length)
        if self.samples_per_epoch < 1:
            raise UserError(
                f"{folder} has {self.stream.num_tokens} training tokens: too few for one sequence of "
                f"data.sequence_length {sequence_length} and the token after it"
            )
        self._epoch = lru_cache(maxsize=2)(self._order)
        self._mask = np.ones(sequence_length, dtype=np.float32)
        self._mask.flags.writeable = False  # all samples share it

    def _order(self, epoch: int) -> EpochOrder:
        build = partial(self._shuffle, epoch)
        return self.cache.order(epoch, build) if self.cache else build()

    def _shuffle(self, epoch: int) -> EpochOrder:
        """Return the order of an epoch, in the smallest dtypes that fit. The dtypes do not affect the random order."""
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        documents = _count_up(len(self.stream.lengths))
        generator.shuffle(documents)
        total = np.uint32 if self.stream.num_tokens < 2**32 else np.int64
        ends = np.cumsum(self.stream.lengths[documents], dtype=total)
        windows = _count_up(self.samples_per_epoch)
        generator.shuffle(windows)
        return EpochOrder(documents, ends, windows)

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index`, counted from 0 over the full run."""
        epoch, position = divmod(index, self.samples_per_epoch)
        order = self._epoch(epoch)
        start = int(order.windows[position]) * self.sequence_length
        tokens = self.stream.read(order.documents, order.ends, start, start + self.sequence_length + 1)
        return tokens, self._mask


def _count_up(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)


class _Conversations:
    """The packed windows of one split of prepared conversations."""

    def __init__(self, prefix: Path, sequence_length: int, eos_id: int) -> None:
        self.stream = _TokenStream(prefix)
        self.sequence_length, self.eos_id = sequence_length, eos_id
        self._loss_mask = np.memmap(f"{prefix}.mask", dtype=np.uint8, mode="r").view(np.ndarray)
        self._firsts = self.stream.dataset.index.document_indices
        self._ends = np.cumsum(self.stream.lengths, dtype=np.int64)

    @property
    def num_windows(self) -> int:
        """Number of windows in the split."""
        return len(self._firsts) - 1

    def window(self, index: int) -> PackedSample:
        """Return window `index`; a window past the last is all padding."""
        length = self.sequence_length
        tokens = np.full(length + 1, self.eos_id, dtype=np.int64)
        mask, document_ids = np.zeros(length, dtype=np.float32), np.zeros(length, dtype=np.int32)
        if index < self.num_windows:
            first, last = int(self._firsts[index]), int(self._firsts[index + 1])
            lengths = self.stream.lengths[first:last]
            stop = int(self._ends[last - 1])
            start, count = stop - int(lengths.sum()), int(lengths.sum())
            tokens[:count] = self.stream.tokens[start:stop]
            mask[: count - 1] = self._loss_mask[start + 1 : stop]
            document_ids[:count] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
            document_ids[count:] = len(lengths)
        return PackedSample(tokens, mask, document_ids)


class ChatTrainDataset(_Conversations):
    """Endless samples of conversations. Every epoch shuffles the windows."""

    def __init__(self, folder: Path, sequence_length: int, eos_id: int, seed: int) -> None:
        super().__init__(folder / "train", sequence_length, eos_id)
        self.seed = seed
        self._epoch = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        windows = _count_up(self.num_windows)
        np.random.Generator(np.random.PCG64([self.seed, epoch])).shuffle(windows)
        return windows

    def __getitem__(self, index: int) -> PackedSample:
        """Return sample `index`, counted from 0 over the full run."""
        epoch, position = divmod(index, self.num_windows)
        return self.window(int(self._epoch(epoch)[position]))


class ChatValDataset(_Conversations):
    """Held-out conversations in stored order; samples past the last are all padding."""

    def __init__(self, folder: Path, sequence_length: int, eos_id: int) -> None:
        super().__init__(folder / "validation", sequence_length, eos_id)

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: int) -> PackedSample:
        return self.window(index)


class MixtureDataset:
    """The training samples of a run: a mixture of the samples of its sources."""

    def __init__(self, mixture: SourceMixture, sources: Mapping[str, TrainDataset | ChatTrainDataset]) -> None:
        self.mixture, self.sources = mixture, sources

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index`, counted from 0 over the full run."""
        source, source_index = self.mixture[index]
        return self.sources[source][source_index]

    def tokens_read(self, num_samples: int) -> dict[str, int]:
        """Return metrics: the tokens of each source in the first `num_samples` samples. Empty for a single source."""
        if len(self.sources) == 1:
            return {}
        counts = self.mixture.counts(num_samples)
        return {f"data/tokens/{name}": counts[name] * source.sequence_length for name, source in self.sources.items()}


def build_train_dataset(
    config: RunConfig, manifests: Mapping[str, dict[str, Any]], cache_folder: Path
) -> MixtureDataset:
    """Return the training samples of a run. `manifests` are by source; epoch orders are cached in `cache_folder`."""
    length, seed = config.data.sequence_length, config.train.seed
    sources: dict[str, TrainDataset | ChatTrainDataset] = {}
    for name, source in config.data.mixture.items():
        if config.data.conversations:
            eos_id = manifests[name]["tokenizer"]["eos_id"]
            sources[name] = ChatTrainDataset(Path(source.path), length, eos_id, seed)
            continue
        idx_sha256 = manifests[name]["splits"]["train"]["idx_sha256"]
        cache = IndexCache(cache_folder, {"idx_sha256": idx_sha256, "sequence_length": length, "seed": seed})
        sources[name] = TrainDataset(Path(source.path), length, seed, cache)
    return MixtureDataset(build_mixture(config), sources)


def build_val_datasets(data_config: DataConfig, manifests: Mapping[str, dict[str, Any]]) -> dict[str, "AnyValDataset"]:
    """Return the held-out samples of each source. `manifests` are by source."""
    dataset_class = ChatValDataset if data_config.conversations else ValDataset
    return {
        name: dataset_class(Path(source.path), data_config.sequence_length, manifests[name]["tokenizer"]["eos_id"])
        for name, source in data_config.mixture.items()
    }


class ValDataset:
    """Held-out text: every token is a label exactly once, in stored order.

    The first token is predicted from `eos_id`, like the first token of every later document. The last window is padded;
    padding does not count as labels. Samples past the last are all padding, so that all ranks can read equally many.
    """

    def __init__(self, folder: Path, sequence_length: int, eos_id: int) -> None:
        self.stream = _TokenStream(folder / "validation")
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
            document_tokens = self.stream.read(None, self.ends, first, stop)
            tokens[1 - (start - first) : 1 + stop - start] = document_tokens
            mask[: stop - start] = 1
        return tokens, mask


AnyValDataset = ValDataset | ChatValDataset


def collate(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens (int64), labels (int64) and loss mask (float32), all [samples, sequence_length]."""
    shape = len(samples), len(samples[0][1])
    tokens, labels = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
    for index, sample in enumerate(samples):
        tokens[index], labels[index] = sample[0][:-1], sample[0][1:]
    mask = np.stack([sample[1] for sample in samples])
    return torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(mask)
