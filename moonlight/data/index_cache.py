"""The order of an epoch on disk: built once on each host, mapped into memory by all of its processes.

No shared filesystem is needed: every host whose folder lacks an epoch builds it, to the same bytes.
"""

import fcntl
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moonlight.files import atomic_folder, make_folder, write_json, xxh3_checksum

VERSION = 1
_SUMS = "sums.json"


class EpochOrder(NamedTuple):
    """Order of an epoch's documents, and of the windows that are cut from them."""

    documents: np.ndarray
    """Number of the document at each place, [documents]."""
    ends: np.ndarray
    """Tokens up to the end of the document at each place, [documents]."""
    windows: np.ndarray
    """Number of the window that is the epoch's first sample, second, and so on, [windows]."""


class IndexCache:
    """Orders of the epochs of one source, in a folder named by a hash of all that they follow from."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """`facts`, which JSON must be able to hold, are what the orders follow from."""
        text = json.dumps({"version": VERSION, **facts}, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]

    def order(self, epoch: int, build: Callable[[], EpochOrder]) -> EpochOrder:
        """The order of `epoch`, mapped from its files; one process of a host calls `build` if they are not there.

        Files that are damaged are built again, and those of finished epochs removed. Processes may still map the epoch
        before, in which the step that reaches `epoch` may begin.
        """
        make_folder(self.folder)
        with (self.folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released with the file, however the process ends
            place = self.folder / f"epoch-{epoch:08d}"
            found = _read(place)
            if found is None:
                if place.exists():
                    print(f"{place} is damaged and made again", file=sys.stderr)
                    shutil.rmtree(place)
                with atomic_folder(place) as part:
                    sums = {}
                    for name, values in build()._asdict().items():
                        np.save(part / f"{name}.npy", values, allow_pickle=False)
                        sums[name] = xxh3_checksum(part / f"{name}.npy")
                    write_json(part / _SUMS, sums)
                found = _read(place)
                assert found is not None, place
            for other in self.folder.glob("epoch-*"):
                if int(other.name.removeprefix("epoch-")) < epoch - 1:
                    shutil.rmtree(other)
        return found


def _read(place: Path) -> EpochOrder | None:
    """The arrays of a folder, mapped, if every file is what was written."""
    try:
        sums = json.loads((place / _SUMS).read_text(encoding="utf-8"))
        files = {name: place / f"{name}.npy" for name in EpochOrder._fields}
        if {name: xxh3_checksum(file) for name, file in files.items()} != sums:
            return None
        # Plain arrays: slices of numpy.memmap cost a microsecond each.
        return EpochOrder(*(np.load(file, mmap_mode="r").view(np.ndarray) for file in files.values()))
    except (OSError, ValueError):
        return None
