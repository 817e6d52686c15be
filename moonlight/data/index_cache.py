"""Cache of epoch orders on disk: one process of each host builds an order, all its processes map it into memory.

No shared file system is needed: every host whose folder lacks an epoch builds it, bit-identically.
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
    """Order of an epoch's documents, and of the windows that the joined documents are split into."""

    documents: np.ndarray
    """Index of the document at each position, [documents]."""
    ends: np.ndarray
    """Tokens up to the end of the document at each position, [documents]."""
    windows: np.ndarray
    """Index of the window of each sample of the epoch, [windows]."""


class IndexCache:
    """Epoch orders of one source, in a folder named by a hash of everything that determines them."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """`facts` are the values that determine the orders; JSON must be able to encode them."""
        text = json.dumps({"version": VERSION, **facts}, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]

    def order(self, epoch: int, build: Callable[[], EpochOrder]) -> EpochOrder:
        """Return the order of `epoch`, mapped from its files; one process of a host calls `build` if they are missing.

        Corrupt files are rebuilt. Files of epochs before `epoch` - 1 are removed; those of `epoch` - 1 stay, because
        the step that reaches `epoch` may start in it.
        """
        make_folder(self.folder)
        with (self.folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the lock ends with the process, even if it is killed
            path = self.folder / f"epoch-{epoch:08d}"
            order = _read(path)
            if order is None:
                if path.exists():
                    print(f"{path} is corrupt; rebuilding", file=sys.stderr)
                    shutil.rmtree(path)
                with atomic_folder(path) as part:
                    sums = {}
                    for name, values in build()._asdict().items():
                        np.save(part / f"{name}.npy", values, allow_pickle=False)
                        sums[name] = xxh3_checksum(part / f"{name}.npy")
                    write_json(part / _SUMS, sums)
                order = _read(path)
                assert order is not None, path
            for other in self.folder.glob("epoch-*"):
                if int(other.name.removeprefix("epoch-")) < epoch - 1:
                    shutil.rmtree(other)
        return order


def _read(folder: Path) -> EpochOrder | None:
    """Return the arrays of a folder, memory-mapped, or None if a file is missing or does not match its checksum."""
    try:
        sums = json.loads((folder / _SUMS).read_text(encoding="utf-8"))
        files = {name: folder / f"{name}.npy" for name in EpochOrder._fields}
        if {name: xxh3_checksum(file) for name, file in files.items()} != sums:
            return None
        # Plain arrays: slicing a numpy.memmap takes a microsecond.
        return EpochOrder(*(np.load(file, mmap_mode="r").view(np.ndarray) for file in files.values()))
    except (OSError, ValueError):
        return None
