"""Orders of epochs on disk: built once, shared, noticed when damaged, gone when finished."""

import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest

from moonlight.data.index_cache import EpochOrder, IndexCache
from moonlight.data.loader import TrainDataset

FACTS = {"idx_sha256": "0", "sequence_length": 32, "seed": 3}


def order_of(number):
    return EpochOrder(
        np.arange(5, dtype=np.int32) + number, np.arange(5, dtype=np.uint32), np.arange(9, dtype=np.int32)
    )


def build_and_note(folder, notes, barrier):
    """One process of a host: what it got, and a line for each time it was asked to build."""

    def build():
        with notes.open("a") as file:
            file.write("built\n")
        return order_of(7)

    barrier.wait()
    order = IndexCache(folder, FACTS).order(0, build)
    assert (order.documents == order_of(7).documents).all()


def test_one_process_of_many_builds(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [
        context.Process(target=build_and_note, args=(tmp_path / "cache", tmp_path / "notes", barrier)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert (tmp_path / "notes").read_text() == "built\n"


def end_while_building(folder):
    IndexCache(folder, FACTS).order(0, lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_process_killed_while_it_builds_leaves_nothing_in_the_way(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=end_while_building, args=(tmp_path,))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    cache = IndexCache(tmp_path, FACTS)
    assert (cache.folder / ".epoch-00000000.part").is_dir()
    found = cache.order(0, lambda: order_of(0))
    assert (found.documents == order_of(0).documents).all()
    assert sorted(path.name for path in cache.folder.iterdir()) == [".lock", "epoch-00000000"]


def test_samples_are_those_without_a_cache(data_folder, tmp_path):
    plain = TrainDataset(data_folder, 32, 3)
    cached = TrainDataset(data_folder, 32, 3, IndexCache(tmp_path, FACTS))
    epoch = plain.samples_per_epoch
    for number in (0, 1, epoch - 1, epoch, 3 * epoch + 5, 7):
        assert (cached[number][0] == plain[number][0]).all()
    mapped = cached._epoch(0)
    for values, expected in zip(mapped, plain._epoch(0), strict=True):
        assert not values.flags.writeable and values.dtype == expected.dtype and values.itemsize == 4
        assert isinstance(values.base, np.memmap)


def overwrite(name, change):
    def edit(place):
        raw = bytearray((place / name).read_bytes())
        change(raw)
        (place / name).write_bytes(raw)

    return edit


def flip(raw):
    raw[-3] ^= 1


def cut(raw):
    del raw[-4:]


def swap(place):
    (place / "documents.npy").rename(place / "other")
    (place / "windows.npy").rename(place / "documents.npy")
    (place / "other").rename(place / "windows.npy")


@pytest.mark.parametrize(
    "damage",
    [
        *(overwrite(f"{name}.npy", change) for name in EpochOrder._fields for change in (flip, cut)),
        overwrite("sums.json", cut),
        overwrite("sums.json", bytearray.clear),
        lambda place: (place / "ends.npy").unlink(),
        lambda place: (place / "sums.json").unlink(),
        lambda place: shutil.copytree(place.parent / "epoch-00000001", place, dirs_exist_ok=True) and flip_first(place),
        swap,
    ],
)
def test_damage_is_noticed_and_mended(tmp_path, capfd, damage):
    cache = IndexCache(tmp_path, FACTS)
    for epoch in (0, 1):
        cache.order(epoch, lambda epoch=epoch: order_of(epoch))
    damage(cache.folder / "epoch-00000000")
    found = IndexCache(tmp_path, FACTS).order(0, lambda: order_of(0))
    assert [(a == b).all() for a, b in zip(found, order_of(0), strict=True)] == [True] * 3
    assert "epoch-00000000 is corrupt; rebuilding" in capfd.readouterr().err
    IndexCache(tmp_path, FACTS).order(0, lambda: pytest.fail("built though it is there"))


def flip_first(place):
    overwrite("documents.npy", flip)(place)


def test_finished_epochs_go_and_other_facts_stay(tmp_path):
    cache, other = IndexCache(tmp_path, FACTS), IndexCache(tmp_path, FACTS | {"seed": 4})
    assert cache.folder != other.folder
    other.order(0, lambda: order_of(9))
    for epoch in range(4):
        cache.order(epoch, lambda epoch=epoch: order_of(epoch))
    assert sorted(path.name for path in cache.folder.glob("epoch-*")) == ["epoch-00000002", "epoch-00000003"]
    assert (other.order(0, lambda: pytest.fail("built again")).documents == order_of(9).documents).all()
