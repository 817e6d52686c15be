"""A run on two sources in two stages with a growing batch: what it reads, says and resumes, end to end."""

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
def other_folder(small_corpus, tokenizer_folder, tmp_path_factory):
    """A second source: 80 documents of 700 characters."""
    place = tmp_path_factory.mktemp("other")
    text = (small_corpus / "tarfile.py").read_text()
    lines = [json.dumps({"text": text[start : start + 700]}) for start in range(0, 80 * 700, 700)]
    (place / "some.jsonl").write_text("\n".join(lines))
    prepare([place / "some.jsonl"], tokenizer_folder, place / "data", validation_share=0.2)
    return place / "data"


@pytest.fixture
def recipe_in(data_folder, other_folder, tokenizer_folder, tmp_path):
    def make(folder, layout, **train):
        """16 sequences in batches of 4, then 40 of the other stage, whose batch grows to 8: 10 steps."""
        growth = (BatchGrowth(after_tokens=24 * LENGTH, global_batch_size=8),)
        train = {
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "batch_growth": growth,
            "validation_sequences": 0,
        } | train
        run = make_run(tmp_path / folder, data_folder, tokenizer_folder, layout, **train)
        split = 15 * LENGTH  # inside a step
        stages = {
            "first": StageConfig(from_tokens=0, to_tokens=split, lr=2e-3, warmup_steps=2, decay="constant"),
            "second": StageConfig(
                from_tokens=split, to_tokens=50 * LENGTH, lr=2e-3, decay="linear", weights={"web": 0.25, "code": 0.75}
            ),
        }
        sources = {"web": {"path": str(data_folder), "weight": 3.0}, "code": {"path": str(other_folder)}}
        data = replace(
            run.data,
            path="",
            sources={name: SourceConfig(**source) for name, source in sources.items()},
            mask_documents=True,
            reset_positions=True,
        )
        optimizer_config = replace(run.optimizer, newton_schulz_dtype="float32")
        course = {"stages": stages, "schedule": None, "train": replace(run.train, train_steps=0)}
        return replace(run, name="mixed", data=data, optimizer=optimizer_config, **course)

    return make


def repeatable(run, folder):
    return [
        {key: value for key, value in entry.items() if not key.startswith(UNREPEATABLE)}
        for entry in read_metrics(folder / run.name)
    ]


def train_in_parts(pool, run_of, layouts, stops):
    for layout, stop in zip(layouts, stops, strict=True):
        run = run_of(layout)
        pool.run(LAYOUTS[layout][0], train_run, replace(run, train=replace(run.train, stop_at_step=stop)))


def train_whole(pool, recipe_in, tmp_path, **train):
    """The recipe of a run by one process that never stopped, and its metrics."""
    whole = recipe_in("whole", "1", **train)
    pool.run(1, train_run, whole)
    expected = repeatable(whole, tmp_path / "whole")
    assert [entry["optim/global_batch_size"] for entry in expected] == [4] * 6 + [8] * 4
    assert expected[-1]["step"] == 10
    return whole, expected


@pytest.mark.parametrize(
    ("layouts", "stops", "validation_sequences"),
    [(("DP2", "TP2"), (5, 0), 16), slow(("DP2", "EP2xDP2", "TP2"), (3, 7, 0), 0)],
)
def test_continued_under_another_layout_reads_the_same(pool, recipe_in, tmp_path, layouts, stops, validation_sequences):
    """With 16 sequences of validation, and with all."""
    train = {"validation_sequences": validation_sequences}
    whole, expected = train_whole(pool, recipe_in, tmp_path, **train)
    train_in_parts(pool, lambda layout: recipe_in("layouts", layout, **train), layouts, stops)
    found = repeatable(whole, tmp_path / "layouts")
    for entry, reference in zip(found, expected, strict=True):
        for key in reference:
            if key.startswith("data/tokens/"):
                assert entry[key] == reference[key]
            elif key.startswith("loss/"):
                assert entry[key] == pytest.approx(reference[key], rel=1e-5)


def test_stopped_and_continued_reads_the_same(pool, recipe_in, tmp_path):
    whole, expected = train_whole(pool, recipe_in, tmp_path)
    train_in_parts(pool, lambda layout: recipe_in("parts", layout), ("1", "1", "1"), (3, 7, 0))
    assert repeatable(whole, tmp_path / "parts") == expected

    samples = build_train_dataset(whole, check_data(whole), cache_folder(whole))
    for entry in expected:
        read = [samples.mixture[number][0] for number in range(entry["consumed_tokens"] // LENGTH)]
        for name in ("web", "code"):
            assert entry[f"data/tokens/{name}"] == LENGTH * read.count(name)
    assert (cache_folder(whole) / samples.sources["web"].cache.folder.name / "epoch-00000000" / "ends.npy").is_file()

    check_summary_of_validation(whole, expected[-1])
    check_card(whole, tmp_path / "whole" / "mixed", tmp_path / "hf", expected[-1])


def check_summary_of_validation(run, last):
    """Over all sources: the mean of theirs, weighted by their tokens; bits over the bytes of all."""
    splits = {name: manifest["splits"]["validation"] for name, manifest in check_data(run).items()}
    total = sum(split["tokens"] for split in splits.values())
    nats = sum(last[f"loss/validation/{name}"] * split["tokens"] for name, split in splits.items())
    assert last["loss/validation"] == pytest.approx(nats / total, rel=1e-6)
    assert last["loss/held_out"] == pytest.approx(last["loss/validation"], rel=1e-6)
    num_bytes = sum(split["bytes"] for split in splits.values())
    assert last["bits_per_byte/held_out"] == pytest.approx(nats / num_bytes / np.log(2), rel=1e-6)


def check_card(run, folder, out, last):
    export(folder, out)
    text = (out / "README.md").read_text()
    manifests = check_data(run)
    assert "| web: " in text and "| code: some.jsonl |" in text
    for name, manifest in manifests.items():
        seen = last[f"data/tokens/{name}"]
        share, passes = seen / last["consumed_tokens"], seen / manifest["splits"]["train"]["tokens"]
        assert f"| {name} | {seen:,} | {share:.1%} | {passes:.3g} |" in text
    assert re.search(r"documents in a sequence \| no attention between them, positions restart in each", text)


def test_a_lone_stage_reads_what_it_reads_in_the_whole_run(recipe_in, tmp_path):
    whole = recipe_in("whole", "1")
    lone = replace(whole, train=replace(whole.train, only_stage="second"))
    first = RunSchedule(lone).first_sequence
    assert first == 15
    ours, theirs = (build_train_dataset(run, check_data(run), tmp_path / "cache") for run in (lone, whole))
    for number in range(first, 60):
        assert (ours[number][0] == theirs[number][0]).all()
    sources = [theirs.mixture[number][0] for number in range(first, first + 1024)]
    assert sources.count("code") == 768


@pytest.mark.parametrize(
    "batches", [[4] * 14, [8] * 7, [4] * 6 + [8] * 4, [16, 16, 24]], ids=["small", "large", "growing", "other"]
)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_batches_do_not_change_what_is_read(recipe_in, tmp_path, batches, ranks):
    """Every rank with samples of its own, opened anew in the middle, as after a resume."""
    run = recipe_in("any", "1")
    reference = build_train_dataset(run, check_data(run), tmp_path / "reference")
    start = 0
    readers = [build_train_dataset(run, check_data(run), tmp_path / "cache") for _ in range(ranks)]
    for step, size in enumerate(batches):
        if step == len(batches) // 2:
            readers = [build_train_dataset(run, check_data(run), tmp_path / "cache") for _ in range(ranks)]
        each = size // ranks
        for rank, reader in enumerate(readers):
            for number in range(start + rank * each, start + (rank + 1) * each):
                assert reader[number][0].tobytes() == reference[number][0].tobytes()
        start += size
    assert start == 56
