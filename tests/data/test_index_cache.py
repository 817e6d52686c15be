"""Epoch orders on disk: built once, shared, rebuilt if corrupt, deleted when the epoch is finished."""

import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest

from moonlight.data.index_cache import EpochOrder, IndexCache
from moonlight.data.loader import TrainDataset

FACTS = {"idx_sha256": "0", "sequence_length": 32, "seed": 3}


def make_order(offset):
    return EpochOrder(
        np.arange(5, dtype=np.int32) + offset, np.arange(5, dtype=np.uint32), np.arange(9, dtype=np.int32)
    )


def build_and_record(folder, notes, barrier):
    """Read the order as one process of a host, and log each build."""

    def build():
        with notes.open("a") as file:
            file.write("built\n")
        return make_order(7)

    barrier.wait()
    order = IndexCache(folder, FACTS).order(0, build)
    assert (order.documents == make_order(7).documents).all()


def test_only_one_of_four_processes_builds(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [
        context.Process(target=build_and_record, args=(tmp_path / "cache", tmp_path / "notes", barrier))
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert (tmp_path / "notes").read_text() == "built\n"


def die_while_building(folder):
    IndexCache(folder, FACTS).order(0, lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_process_killed_while_building_does_not_block_the_next(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=die_while_building, args=(tmp_path,))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    cache = IndexCache(tmp_path, FACTS)
    assert (cache.folder / ".epoch-00000000.part").is_dir()
    order = cache.order(0, lambda: make_order(0))
    assert (order.documents == make_order(0).documents).all()
    assert sorted(path.name for path in cache.folder.iterdir()) == [".lock", "epoch-00000000"]


def test_samples_equal_those_without_a_cache(data_folder, tmp_path):
    plain = TrainDataset(data_folder, 32, 3)
    cached = TrainDataset(data_folder, 32, 3, IndexCache(tmp_path, FACTS))
    epoch = plain.samples_per_epoch
    for index in (0, 1, epoch - 1, epoch, 3 * epoch + 5, 7):
        assert (cached[index][0] == plain[index][0]).all()
    mapped = cached._epoch(0)
    for values, expected in zip(mapped, plain._epoch(0), strict=True):
        assert not values.flags.writeable and values.dtype == expected.dtype and values.itemsize == 4
        assert isinstance(values.base, np.memmap)


def overwrite(name, change):
    def edit(folder):
        raw = bytearray((folder / name).read_bytes())
        change(raw)
        (folder / name).write_bytes(raw)

    return edit


def flip(raw):
    raw[-3] ^= 1


def cut(raw):
    del raw[-4:]


def swap(folder):
    (folder / "documents.npy").rename(folder / "other")
    (folder / "windows.npy").rename(folder / "documents.npy")
    (folder / "other").rename(folder / "windows.npy")


@pytest.mark.parametrize(
    "damage",
    [
        *(overwrite(f"{name}.npy", change) for name in EpochOrder._fields for change in (flip, cut)),
        overwrite("sums.json", cut),
        overwrite("sums.json", bytearray.clear),
        lambda folder: (folder / "ends.npy").unlink(),
        lambda folder: (folder / "sums.json").unlink(),
        lambda folder: (
            shutil.copytree(folder.parent / "epoch-00000001", folder, dirs_exist_ok=True) and flip_first(folder)
        ),
        swap,
    ],
)
def test_a_corrupt_order_is_detected_and_rebuilt(tmp_path, capfd, damage):
    cache = IndexCache(tmp_path, FACTS)
    for epoch in (0, 1):
        cache.order(epoch, lambda epoch=epoch: make_order(epoch))
    damage(cache.folder / "epoch-00000000")
    order = IndexCache(tmp_path, FACTS).order(0, lambda: make_order(0))
    assert [(a == b).all() for a, b in zip(order, make_order(0), strict=True)] == [True] * 3
    assert "epoch-00000000 is corrupt; rebuilding" in capfd.readouterr().err
    IndexCache(tmp_path, FACTS).order(0, lambda: pytest.fail("rebuilt a valid order"))


def flip_first(folder):
    overwrite("documents.npy", flip)(folder)


def test_finished_epochs_are_deleted_and_other_caches_stay(tmp_path):
    cache, other = IndexCache(tmp_path, FACTS), IndexCache(tmp_path, FACTS | {"seed": 4})
    assert cache.folder != other.folder
    other.order(0, lambda: make_order(9))
    for epoch in range(4):
        cache.order(epoch, lambda epoch=epoch: make_order(epoch))
    assert sorted(path.name for path in cache.folder.glob("epoch-*")) == ["epoch-00000002", "epoch-00000003"]
    assert (other.order(0, lambda: pytest.fail("rebuilt a valid order")).documents == make_order(9).documents).all()
