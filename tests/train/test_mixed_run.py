"""A run on two sources in two stages with a growing batch: data order, metrics and resuming, end to end."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from checkpoints.export import export
from moonlight.config.data import SourceConfig
from moonlight.config.schedule import BatchGrowth, StageConfig
from moonlight.config.timeline import RunSchedule
from moonlight.data.loader import build_train_dataset
from moonlight.data.prepare import prepare
from moonlight.train.metrics import UNREPEATABLE, read_metrics
from moonlight.train.run_folder import cache_folder, check_data
from tests.support.layouts import LAYOUTS, make_run, train_run
from tests.support.suites import slow

LENGTH = 32


@pytest.fixture(scope="module")
def other_data_folder(small_corpus, tokenizer_folder, tmp_path_factory):
    """A second source: 80 documents of 700 characters."""
    folder = tmp_path_factory.mktemp("other")
    text = (small_corpus / "tarfile.py").read_text()
    lines = [json.dumps({"text": text[start : start + 700]}) for start in range(0, 80 * 700, 700)]
    (folder / "some.jsonl").write_text("\n".join(lines))
    prepare([folder / "some.jsonl"], tokenizer_folder, folder / "data", validation_share=0.2)
    return folder / "data"


@pytest.fixture
def config_in(data_folder, other_data_folder, tokenizer_folder, tmp_path):
    def make(folder, layout, **train):
        """Return the config: 16 sequences in batches of 4, then 40 in the second stage, whose batch grows to 8.

        These are 10 steps.
        """
        growth = (BatchGrowth(after_tokens=24 * LENGTH, global_batch_size=8),)
        train = {
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "batch_growth": growth,
            "validation_sequences": 0,
        } | train
        config = make_run(tmp_path / folder, data_folder, tokenizer_folder, layout, **train)
        split = 15 * LENGTH  # inside a step
        stages = {
            "first": StageConfig(from_tokens=0, to_tokens=split, lr=2e-3, warmup_steps=2, decay="constant"),
            "second": StageConfig(
                from_tokens=split, to_tokens=50 * LENGTH, lr=2e-3, decay="linear", weights={"web": 0.25, "code": 0.75}
            ),
        }
        sources = {"web": {"path": str(data_folder), "weight": 3.0}, "code": {"path": str(other_data_folder)}}
        data = replace(
            config.data,
            path="",
            sources={name: SourceConfig(**source) for name, source in sources.items()},
            mask_documents=True,
            reset_positions=True,
        )
        optimizer_config = replace(config.optimizer, newton_schulz_dtype="float32")
        schedule = {"stages": stages, "schedule": None, "train": replace(config.train, train_steps=0)}
        return replace(config, name="mixed", data=data, optimizer=optimizer_config, **schedule)

    return make


def repeatable(config, folder):
    """Return the metrics that must repeat."""
    return [
        {key: value for key, value in entry.items() if not key.startswith(UNREPEATABLE)}
        for entry in read_metrics(folder / config.name)
    ]


def train_in_parts(pool, make_config, layouts, stops):
    for layout, stop in zip(layouts, stops, strict=True):
        config = make_config(layout)
        pool.run(LAYOUTS[layout][0], train_run, replace(config, train=replace(config.train, stop_at_step=stop)))


def train_uninterrupted(pool, config_in, tmp_path, **train):
    """Train on one process without stopping; return the config and the metrics."""
    uninterrupted = config_in("uninterrupted", "1", **train)
    pool.run(1, train_run, uninterrupted)
    expected = repeatable(uninterrupted, tmp_path / "uninterrupted")
    assert [entry["optim/global_batch_size"] for entry in expected] == [4] * 6 + [8] * 4
    assert expected[-1]["step"] == 10
    return uninterrupted, expected


@pytest.mark.parametrize(
    ("layouts", "stops", "validation_sequences"),
    [slow(("DP2", "TP2"), (5, 0), 16), slow(("DP2", "EP2xDP2", "TP2"), (3, 7, 0), 0)],
)
def test_resuming_in_another_layout_reads_the_same(pool, config_in, tmp_path, layouts, stops, validation_sequences):
    """Token counts must be equal, and losses agree to 1e-5, with 16 validation sequences and with all."""
    train = {"validation_sequences": validation_sequences}
    uninterrupted, expected = train_uninterrupted(pool, config_in, tmp_path, **train)
    train_in_parts(pool, lambda layout: config_in("layouts", layout, **train), layouts, stops)
    metrics = repeatable(uninterrupted, tmp_path / "layouts")
    for entry, reference in zip(metrics, expected, strict=True):
        for key in reference:
            if key.startswith("data/tokens/"):
                assert entry[key] == reference[key]
            elif key.startswith("loss/"):
                assert entry[key] == pytest.approx(reference[key], rel=1e-5)


def test_stopped_and_resumed_reads_the_same(pool, config_in, tmp_path):
    uninterrupted, expected = train_uninterrupted(pool, config_in, tmp_path)
    train_in_parts(pool, lambda layout: config_in("parts", layout), ("1", "1", "1"), (3, 7, 0))
    assert repeatable(uninterrupted, tmp_path / "parts") == expected

    samples = build_train_dataset(uninterrupted, check_data(uninterrupted), cache_folder(uninterrupted))
    for entry in expected:
        names = [samples.mixture[index][0] for index in range(entry["consumed_tokens"] // LENGTH)]
        for name in ("web", "code"):
            assert entry[f"data/tokens/{name}"] == LENGTH * names.count(name)
    assert (
        cache_folder(uninterrupted) / samples.sources["web"].cache.folder.name / "epoch-00000000" / "ends.npy"
    ).is_file()

    check_summary_of_validation(uninterrupted, expected[-1])
    check_card(uninterrupted, tmp_path / "uninterrupted" / "mixed", tmp_path / "hf", expected[-1])


def check_summary_of_validation(config, last):
    """Check the losses over all sources: means weighted by tokens, and bits per byte over the bytes of all sources."""
    splits = {name: manifest["splits"]["validation"] for name, manifest in check_data(config).items()}
    total = sum(split["tokens"] for split in splits.values())
    nats = sum(last[f"loss/validation/{name}"] * split["tokens"] for name, split in splits.items())
    assert last["loss/validation"] == pytest.approx(nats / total, rel=1e-6)
    assert last["loss/held_out"] == pytest.approx(last["loss/validation"], rel=1e-6)
    num_bytes = sum(split["bytes"] for split in splits.values())
    assert last["bits_per_byte/held_out"] == pytest.approx(nats / num_bytes / np.log(2), rel=1e-6)


def check_card(config, folder, out, last):
    export(folder, out)
    text = (out / "README.md").read_text()
    manifests = check_data(config)
    assert "| web: " in text and "| code: some.jsonl |" in text
    for name, manifest in manifests.items():
        seen = last[f"data/tokens/{name}"]
        fraction, passes = seen / last["consumed_tokens"], seen / manifest["splits"]["train"]["tokens"]
        assert f"| {name} | {seen:,} | {fraction:.1%} | {passes:.3g} |" in text
    assert re.search(r"documents in a sequence \| no attention between them, positions restart in each", text)


def test_a_single_stage_reads_the_same_as_in_the_full_run(config_in, tmp_path):
    uninterrupted = config_in("uninterrupted", "1")
    only_second = replace(uninterrupted, train=replace(uninterrupted.train, only_stage="second"))
    first = RunSchedule(only_second).first_sequence
    assert first == 15
    single, full = (
        build_train_dataset(config, check_data(config), tmp_path / "cache") for config in (only_second, uninterrupted)
    )
    for index in range(first, 60):
        assert (single[index][0] == full[index][0]).all()
    sources = [full.mixture[index][0] for index in range(first, first + 1024)]
    assert sources.count("code") == 768


@pytest.mark.parametrize(
    "batches", [[4] * 14, [8] * 7, [4] * 6 + [8] * 4, [16, 16, 24]], ids=["small", "large", "growing", "other"]
)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_batches_do_not_change_what_is_read(config_in, tmp_path, batches, ranks):
    """Every rank opens its own dataset, and reopens it halfway, as after a resume."""
    config = config_in("any", "1")
    reference = build_train_dataset(config, check_data(config), tmp_path / "reference")
    start = 0
    readers = [build_train_dataset(config, check_data(config), tmp_path / "cache") for _ in range(ranks)]
    for step, size in enumerate(batches):
        if step == len(batches) // 2:
            readers = [build_train_dataset(config, check_data(config), tmp_path / "cache") for _ in range(ranks)]
        per_rank = size // ranks
        for rank, reader in enumerate(readers):
            for index in range(start + rank * per_rank, start + (rank + 1) * per_rank):
                assert reader[index][0].tobytes() == reference[index][0].tobytes()
        start += size
    assert start == 56
