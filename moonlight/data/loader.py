"""Token windows for training and validation: what a sample holds is a function of the seed and its number alone."""

from functools import lru_cache
from pathlib import Path

import moonlight.cpu  # noqa: F401  (stand-ins, before Megatron)

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from moonlight.errors import UserError

Sample = tuple[np.ndarray, np.ndarray]
"""Tokens [sequence_length + 1] int64, and which of the last sequence_length count as labels, float32."""


class _Stream:
    """The documents of one split, joined in a given order, read by position."""

    def __init__(self, prefix: Path) -> None:
        try:
            self.dataset = IndexedDataset(str(prefix))
        except (AssertionError, ValueError, KeyError):
            raise UserError(
                f"data {prefix}.idx is damaged: make the folder with `moonlight data prepare` again"
            ) from None
        self.lengths = np.asarray(self.dataset.sequence_lengths, dtype=np.int64)
        self.num_tokens = int(self.lengths.sum())

    def read(self, order: np.ndarray | None, ends: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the documents in `order` (None: as stored); `ends` are their running totals."""
        parts = []
        place = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            document = place if order is None else int(order[place])
            offset = start - (int(ends[place]) - int(self.lengths[document]))
            length = min(stop - start, int(ends[place]) - start)
            parts.append(self.dataset.get(document, offset=offset, length=length))
            start += length
            place += 1
        return np.concatenate(parts).astype(np.int64)


class TrainingSamples:
    """Endless samples: every epoch shuffles the documents, joins them, cuts windows, and shuffles those.

    Neighbouring windows share one token, so each token but the first of an epoch is a label once.
    """

    def __init__(self, folder: Path, sequence_length: int, seed: int) -> None:
        self.stream = _Stream(folder / "train")
        self.sequence_length, self.seed = sequence_length, seed
        self.samples_per_epoch = (self.stream.num_tokens - 1) // sequence_length
        if self.samples_per_epoch < 1:
            raise UserError(
                f"{folder} has {self.stream.num_tokens} training tokens: too few for one sequence of "
                f"data.sequence_length {sequence_length} and the token after it"
            )
        self._epoch = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Order of documents, their running totals, and order of windows."""
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        order = generator.permutation(len(self.stream.lengths))
        return order, np.cumsum(self.stream.lengths[order]), generator.permutation(self.samples_per_epoch)

    def __getitem__(self, number: int) -> Sample:
        """Sample `number`, counted from 0 over the whole run."""
        epoch, place = divmod(number, self.samples_per_epoch)
        order, ends, windows = self._epoch(epoch)
        start = int(windows[place]) * self.sequence_length
        tokens = self.stream.read(order, ends, start, start + self.sequence_length + 1)
        return tokens, np.ones(self.sequence_length, dtype=np.float32)


class ValidationSamples:
    """Every token of the held-out documents as a label exactly once, in order.

    The first token of all is predicted from `eos_id`, as every later document's first is. The last window is padded,
    its padding does not count; samples past the last are all padding, so that ranks can have equal shares.
    """

    def __init__(self, folder: Path, sequence_length: int, eos_id: int) -> None:
        self.stream = _Stream(folder / "validation")
        self.sequence_length, self.eos_id = sequence_length, eos_id
        self.ends = np.cumsum(self.stream.lengths)

    def __len__(self) -> int:
        return -(-self.stream.num_tokens // self.sequence_length)

    def __getitem__(self, number: int) -> Sample:
        length = self.sequence_length
        start = number * length
        stop = max(start, min(start + length, self.stream.num_tokens))
        tokens = np.full(length + 1, self.eos_id, dtype=np.int64)
        mask = np.zeros(length, dtype=np.float32)
        if stop > start:
            first = max(start - 1, 0)
            known = self.stream.read(None, self.ends, first, stop)
            tokens[1 - (start - first) : 1 + stop - start] = known
            mask[: stop - start] = 1
        return tokens, mask


def stack(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens and labels, int64, and loss mask, float32, all [samples, sequence_length]."""
    tokens = torch.from_numpy(np.stack([tokens for tokens, _ in samples]))
    mask = torch.from_numpy(np.stack([mask for _, mask in samples]))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask
