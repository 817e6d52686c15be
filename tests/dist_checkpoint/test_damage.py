"""Corrupt checkpoints of a run on two ranks must be detected, named and never loaded; the previous one is used."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from checkpoints.reader import open_checkpoint
from moonlight.dist_checkpoint.recovery import newest_valid, newest_valid_up_to
from moonlight.dist_checkpoint.state import resolve_checkpoint
from moonlight.errors import UserError
from tests.support.bad_input import MaliciousPickle, in_state, sign
from tests.support.layouts import make_run, train_run
from tests.support.suites import slow

BEFORE, NEWEST = "step-00000004", "step-00000006"
FILES = ("__0_0.distcp", "__1_0.distcp", ".metadata", "state.json")
KEY = "embedding.word_embeddings.weight"
ALL = 200
"""Number of cases in `make test-faults`; `make test` has one of each kind, `make test-slow` a few more."""


def flip_bits(folder, rng, mark):
    path = folder / rng.choice(FILES)
    raw = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 8))):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    return [path.name]


def truncate(folder, rng, mark):
    path = folder / rng.choice(FILES)
    os.truncate(path, rng.randrange(path.stat().st_size))
    return [path.name]


def grow(folder, rng, mark):
    path = folder / rng.choice(FILES)
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 5000)))
    return [path.name]


def zero_a_page(folder, rng, mark):
    """Zero a page, as after a power failure; choose one that has nonzero bytes."""
    path = folder / rng.choice(FILES[:2])
    raw = bytearray(path.read_bytes())
    start = rng.choice([start for start in range(0, len(raw) - 4096, 4096) if any(raw[start : start + 4096])])
    raw[start : start + 4096] = bytes(4096)
    path.write_bytes(raw)
    return [path.name]


def remove(folder, rng, mark):
    path = folder / rng.choice(FILES)
    path.unlink()
    return [path.name]


def swap(folder, rng, mark):
    first, second = (folder / name for name in rng.sample(FILES, 2))
    first.rename(folder / "other")
    second.rename(first)
    (folder / "other").rename(second)
    return [first.name, second.name]


def take_from_another_step(folder, rng, mark):
    name = rng.choice(FILES[:2])
    shutil.copy(folder.parent / BEFORE / name, folder / name)
    return [name]


def edit_state(folder, rng, mark):
    """Edit state.json without a new checksum."""
    path = folder / "state.json"
    content = json.loads(path.read_text())
    rng.choice(
        (
            lambda: content["state"].update(step=5),
            lambda: content["state"].update(consumed_sequences=1),
            lambda: content["recipe"]["schedule"].update(lr=1.0),
            lambda: content["files"].pop("__1_0.distcp"),
            lambda: content.pop("format"),
            lambda: content.pop("xxh3"),
            lambda: content.update(format=99),
            content.clear,
        )
    )()
    path.write_text(json.dumps(content, indent=2))
    return ["state.json"]


def malicious_index(folder, rng, mark):
    (folder / ".metadata").write_bytes(pickle.dumps(MaliciousPickle(mark)))
    return [".metadata"]


def signed_malicious_index(folder, rng, mark):
    malicious_index(folder, rng, mark)
    sign(folder)
    return [".metadata is invalid: posix.mkdir is not allowed in an index"]


def signed_malicious_tensor(folder, rng, mark):
    """Point one tensor of a valid index to a malicious file."""
    path = folder / "__0_9.distcp"
    torch.save(MaliciousPickle(mark), path)
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.storage_data[MetadataIndex(KEY, (0, 0))] = _StorageInfo(path.name, 0, path.stat().st_size)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    sign(folder)
    return [f"{path.name} is invalid: {KEY} in it is not a tensor"]


KINDS = (
    flip_bits,
    truncate,
    remove,
    swap,
    edit_state,
    flip_bits,
    take_from_another_step,
    zero_a_page,
    malicious_index,
    grow,
    flip_bits,
    signed_malicious_index,
    signed_malicious_tensor,
)


def make_config(runs, data_folder, tokenizer_folder, **train):
    train = {"train_steps": 8, "save_every_steps": 2, "validate_every_steps": 8, "keep_checkpoints": 3} | train
    return make_run(runs, data_folder, tokenizer_folder, "DP2", **train)


@pytest.fixture(scope="module")
def stopped(pool, data_folder, tokenizer_folder, tmp_path_factory):
    """A run on two ranks that stopped after step 6 of 8, with checkpoints after 2, 4 and 6. Tests copy it."""
    runs = tmp_path_factory.mktemp("stopped")
    pool.run(2, train_run, make_config(runs, data_folder, tokenizer_folder, stop_at_step=6))
    checkpoints = runs / "DP2" / "checkpoints"
    assert sorted(path.name for path in (checkpoints / NEWEST).iterdir()) == sorted(FILES)
    return runs


def recover(checkpoints):
    return newest_valid(checkpoints)


def check_skipped(checkpoints, outcome, expected_words):
    """Check that the corrupt checkpoint was named and quarantined, and the previous one chosen."""
    checkpoint_folder, warnings = outcome
    assert checkpoint_folder == checkpoints / BEFORE, warnings
    assert any(NEWEST in text and name in text for text in warnings for name in expected_words), (
        warnings,
        expected_words,
    )
    assert f"resuming from {checkpoints / BEFORE}" in warnings[-1]
    assert (checkpoints / "latest").read_text() == BEFORE + "\n"
    assert not (checkpoints / NEWEST).exists() and (checkpoints / f"damaged-{NEWEST}").is_dir()
    assert resolve_checkpoint(checkpoints) == checkpoints / BEFORE


@pytest.mark.parametrize(
    "number",
    [
        *range(len(KINDS)),
        *map(slow, range(len(KINDS), 22)),
        *(pytest.param(number, marks=pytest.mark.faults) for number in range(22, ALL)),
    ],
)
def test_a_corrupt_checkpoint_is_skipped(single_process, stopped, tmp_path, number):
    kind, rng = KINDS[number % len(KINDS)], random.Random(number)
    checkpoints = Path(shutil.copytree(stopped / "DP2" / "checkpoints", tmp_path / "checkpoints"))
    mark = tmp_path / "mark"
    expected_words = kind(checkpoints / NEWEST, rng, mark)
    check_skipped(checkpoints, recover(checkpoints), expected_words)
    assert not mark.exists()


def test_both_ranks_detect_corruption_that_one_of_them_reads(pool, stopped, tmp_path):
    for number, name in enumerate(FILES):
        checkpoints = Path(shutil.copytree(stopped / "DP2" / "checkpoints", tmp_path / str(number)))
        raw = bytearray((checkpoints / NEWEST / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (checkpoints / NEWEST / name).write_bytes(raw)
        first, second = pool.run(2, recover, checkpoints)
        assert first == second
        check_skipped(checkpoints, first, [name])


def test_training_resumes_from_the_previous_checkpoint(pool, stopped, data_folder, tokenizer_folder, tmp_path):
    """The run must be bit-identical to one without corruption; retention must not count the quarantined checkpoint."""
    tensors = []
    for name in ("valid", "corrupt"):
        shutil.copytree(stopped, tmp_path / name)
        checkpoints = tmp_path / name / "DP2" / "checkpoints"
        if name == "corrupt":
            flip_bits(checkpoints / NEWEST, random.Random(0), None)
        pool.run(2, train_run, make_config(tmp_path / name, data_folder, tokenizer_folder, keep_checkpoints=2))
        checkpoint = open_checkpoint(checkpoints)
        assert checkpoint.state.step == 8
        tensors.append({key: checkpoint.read(key) for key in checkpoint.stored.shapes})
        names = sorted(path.name for path in checkpoints.iterdir())
        assert names == [*["damaged-step-00000006"] * (name == "corrupt"), "latest", "step-00000006", "step-00000008"]
    first, second = tensors
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("content", ["step-00000099", "", "..", "/etc", b"\xff", None])
def test_latest_names_no_checkpoint(single_process, stopped, tmp_path, content):
    checkpoints = Path(shutil.copytree(stopped / "DP2" / "checkpoints", tmp_path / "checkpoints"))
    latest = checkpoints / "latest"
    latest.unlink()
    if content is not None:
        latest.write_bytes(content if isinstance(content, bytes) else content.encode())
    checkpoint_folder, warnings = recover(checkpoints)
    assert checkpoint_folder == checkpoints / NEWEST and latest.read_text() == NEWEST + "\n"
    assert f"{latest} {'is missing' if content is None else 'names no checkpoint'}" in warnings[0]


def test_latest_set_to_an_older_step_is_followed(single_process, stopped, tmp_path):
    checkpoints = Path(shutil.copytree(stopped / "DP2" / "checkpoints", tmp_path / "checkpoints"))
    (checkpoints / "latest").write_text("step-00000002")
    checkpoint_folder, warnings = recover(checkpoints)
    assert checkpoint_folder == checkpoints / "step-00000002"
    for name, warning in zip((NEWEST, BEFORE), warnings, strict=False):
        words = (
            f"{checkpoints / name} is newer than the checkpoint that latest names; "
            f"it was moved to {checkpoints / 'later-'}{name}: "
        )
        assert words in warning
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == [f"later-{BEFORE}", f"later-{NEWEST}", "latest", "step-00000002"]


def test_the_last_completed_checkpoint_is_used_although_latest_is_stale(single_process, stopped, tmp_path):
    """This is the state after a crash between completing a checkpoint and writing latest."""
    checkpoints = Path(shutil.copytree(stopped / "DP2" / "checkpoints", tmp_path / "checkpoints"))
    (checkpoints / "latest").write_text(BEFORE)
    later = (checkpoints / "latest").stat().st_mtime + 1
    os.utime(checkpoints / NEWEST / "state.json", (later, later))
    checkpoint_folder, warnings = recover(checkpoints)
    assert checkpoint_folder == checkpoints / NEWEST and (checkpoints / "latest").read_text() == NEWEST + "\n"
    assert f"latest does not name {NEWEST} yet" in warnings[0]


def test_a_rollback_goes_to_a_valid_checkpoint(single_process, stopped, tmp_path):
    checkpoints = Path(shutil.copytree(stopped / "DP2" / "checkpoints", tmp_path / "checkpoints"))
    assert newest_valid_up_to(checkpoints, 7) == checkpoints / NEWEST
    flip_bits(checkpoints / NEWEST, random.Random(0), None)
    assert newest_valid_up_to(checkpoints, 7) == newest_valid_up_to(checkpoints, 4) == checkpoints / BEFORE
    assert newest_valid_up_to(checkpoints, 1) is None


def test_no_valid_checkpoint_is_left(single_process, stopped, tmp_path):
    checkpoints = Path(shutil.copytree(stopped / "DP2" / "checkpoints", tmp_path / "checkpoints"))
    for folder in checkpoints.glob("step-*"):
        truncate(folder, random.Random(1), None)
    before = sorted(checkpoints.rglob("*"))
    with pytest.raises(UserError, match=r"holds no valid checkpoint \(3 corrupt: .*step-00000006.*step-00000002"):
        recover(checkpoints)
    assert sorted(checkpoints.rglob("*")) == before
    assert recover(tmp_path / "never") == (None, [])


def test_a_later_format_is_not_skipped(single_process, stopped, tmp_path, monkeypatch):
    """A checkpoint of a later format must raise an error, because skipping it would lose progress."""
    from moonlight.dist_checkpoint import state

    checkpoints = Path(shutil.copytree(stopped / "DP2" / "checkpoints", tmp_path / "checkpoints"))
    with monkeypatch.context() as patch:
        patch.setattr(state, "FORMAT", 3)
        in_state(lambda content: content.update(more=1))(checkpoints / NEWEST)
    with pytest.raises(UserError, match="has format 3: this version of the software reads formats up to 2"):
        recover(checkpoints)
    assert (checkpoints / NEWEST).is_dir()
