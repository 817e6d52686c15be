"""Samples: every token is a label once an epoch, in an order that depends only on the seed."""

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


def test_an_epoch_has_every_window_once_and_epochs_differ(folder):
    samples = TrainDataset(folder, 16, seed=1)
    epoch = samples.samples_per_epoch
    assert epoch == (samples.stream.num_tokens - 1) // 16
    for start in (0, epoch):
        labels = np.concatenate([samples[start + index][0][1:] for index in range(epoch)])
        words = labels[labels != EOS]
        assert len(words) == len(set(words))  # no token twice
        assert len(labels) == epoch * 16
    orders = [[tuple(samples[start + index][0]) for index in range(epoch)] for start in (0, epoch)]
    assert orders[0] != orders[1]


def test_a_sample_depends_only_on_seed_and_index(folder):
    ordered, samples = TrainDataset(folder, 16, seed=1), TrainDataset(folder, 16, seed=1)
    indices = np.random.default_rng(0).permutation(3 * ordered.samples_per_epoch)
    shuffled = {index: samples[int(index)][0] for index in indices}
    for index in range(len(indices)):
        assert (ordered[index][0] == shuffled[index]).all()
    assert any((ordered[index][0] != TrainDataset(folder, 16, seed=2)[index][0]).any() for index in range(5))


def test_order_equals_a_slow_reference(folder):
    """The order of a seed equals documents drawn and joined one by one; it must never change."""
    samples = TrainDataset(folder, 16, seed=7)
    dataset = samples.stream.dataset
    for epoch in (0, 1, 5):
        generator = np.random.Generator(np.random.PCG64([7, epoch]))
        joined = np.concatenate([dataset[int(document)] for document in generator.permutation(60)])
        windows = generator.permutation((len(joined) - 1) // 16)
        for position, window in enumerate(windows):
            tokens, _ = samples[epoch * len(windows) + position]
            assert tokens.dtype == np.int64
            assert (tokens == joined[16 * window : 16 * window + 17]).all()


def test_an_index_of_other_data_is_refused(folder, tmp_path):
    for name in ("train.bin", "train.idx"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-4])
    with pytest.raises(UserError, match=r"train\.idx counts \d+ tokens, .*train\.bin has \d+: make the folder"):
        TrainDataset(tmp_path, 16, seed=1)


def test_tokens_are_in_document_order(folder):
    samples = TrainDataset(folder, 16, seed=4)
    for index in range(samples.samples_per_epoch):
        tokens, mask = samples[index]
        assert mask.all() and len(tokens) == 17
        inside = (tokens[:-1] != EOS) & (tokens[1:] != EOS)
        assert (tokens[1:][inside] == tokens[:-1][inside] + 1).all()


def test_validation_predicts_every_token_once_in_order(folder):
    samples = ValDataset(folder, 16, eos_id=EOS)
    labels, inputs = [], []
    for sample in range(len(samples) + 2):
        tokens, mask = samples[sample]
        labels += list(tokens[1:][mask == 1])
        inputs += list(tokens[:-1][mask == 1])
        assert sample < len(samples) or not mask.any()
    stream = np.concatenate([samples.stream.dataset[index] for index in range(len(samples.stream.lengths))])
    assert labels == list(stream)
    assert inputs == [EOS, *stream[:-1]]


def test_too_little_text_is_refused(folder):
    with pytest.raises(UserError, match="sequence_length 100000"):
        TrainDataset(folder, 100000, seed=1)
