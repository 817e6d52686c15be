"""Samples: every token a label once an epoch, whoever reads them."""

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from moonlight.data.loader import TrainDataset, ValDataset
from moonlight.errors import UserError

EOS = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents of 1 to 40 distinct tokens, each ending with EOS."""
    folder = tmp_path_factory.mktemp("split")
    lengths = np.random.default_rng(3).integers(1, 40, size=60)
    for split in ("train", "validation"):
        builder = IndexedDatasetBuilder(str(folder / f"{split}.bin"), np.int32)
        start = 1
        for length in lengths:
            document = np.append(np.arange(start, start + length), EOS).astype(np.int32)
            builder.add_document(document, [len(document)])
            start += length
        builder.finalize(str(folder / f"{split}.idx"))
    return folder


def test_an_epoch_shows_every_window_once_and_epochs_differ(folder):
    samples = TrainDataset(folder, 16, seed=1)
    epoch = samples.samples_per_epoch
    assert epoch == (samples.stream.num_tokens - 1) // 16
    for first in (0, epoch):
        labels = np.concatenate([samples[first + number][0][1:] for number in range(epoch)])
        words = labels[labels != EOS]
        assert len(words) == len(set(words))  # none twice
        assert len(labels) == epoch * 16
    orders = [[tuple(samples[first + number][0]) for number in range(epoch)] for first in (0, epoch)]
    assert orders[0] != orders[1]


def test_a_sample_depends_on_seed_and_number_alone(folder):
    one, other = TrainDataset(folder, 16, seed=1), TrainDataset(folder, 16, seed=1)
    numbers = np.random.default_rng(0).permutation(3 * one.samples_per_epoch)
    shuffled = {number: other[int(number)][0] for number in numbers}
    for number in range(len(numbers)):
        assert (one[number][0] == shuffled[number]).all()
    assert any((one[n][0] != TrainDataset(folder, 16, seed=2)[n][0]).any() for n in range(5))


def test_the_order_is_that_of_a_slow_twin(folder):
    """Documents drawn and joined one by one: what a seed means must never change."""
    samples = TrainDataset(folder, 16, seed=7)
    dataset = samples.stream.dataset
    for epoch in (0, 1, 5):
        generator = np.random.Generator(np.random.PCG64([7, epoch]))
        joined = np.concatenate([dataset[int(document)] for document in generator.permutation(60)])
        windows = generator.permutation((len(joined) - 1) // 16)
        for place, window in enumerate(windows):
            tokens, _ = samples[epoch * len(windows) + place]
            assert tokens.dtype == np.int64
            assert (tokens == joined[16 * window : 16 * window + 17]).all()


def test_an_index_of_other_data_is_refused(folder, tmp_path):
    for name in ("train.bin", "train.idx"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-4])
    with pytest.raises(UserError, match=r"train\.idx counts \d+ tokens, .*train\.bin has \d+: make the folder"):
        TrainDataset(tmp_path, 16, seed=1)


def test_tokens_follow_each_other_as_in_the_documents(folder):
    samples = TrainDataset(folder, 16, seed=4)
    for number in range(samples.samples_per_epoch):
        tokens, mask = samples[number]
        assert mask.all() and len(tokens) == 17
        inside = (tokens[:-1] != EOS) & (tokens[1:] != EOS)
        assert (tokens[1:][inside] == tokens[:-1][inside] + 1).all()


def test_validation_predicts_every_token_once_in_order(folder):
    samples = ValDataset(folder, 16, eos_id=EOS)
    labels, inputs = [], []
    for number in range(len(samples) + 2):
        tokens, mask = samples[number]
        labels += list(tokens[1:][mask == 1])
        inputs += list(tokens[:-1][mask == 1])
        assert number < len(samples) or not mask.any()
    stream = np.concatenate([samples.stream.dataset[index] for index in range(len(samples.stream.lengths))])
    assert labels == list(stream)
    assert inputs == [EOS, *stream[:-1]]


def test_too_little_text_is_refused(folder):
    with pytest.raises(UserError, match="sequence_length 100000"):
        TrainDataset(folder, 100000, seed=1)
