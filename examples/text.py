"""Tokens for a language model: the bytes of this Python's library sources, or FineWeb shards in speedrun's format."""

import functools
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moonlight.data.documents import SKIPPED_NAMES, read_records
from moonlight.errors import UserError

STANDARD_LIBRARY = "python"
BYTES = 256
GPT2_TOKENS = 50304
"""50,257, filled up to a multiple of 128."""
MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
"""A shard begins with 256 int32: these two, the number of tokens, zeros. Then come the tokens, uint16."""
HELD_OUT_SHARE = 0.05


@dataclass(frozen=True)
class Text:
    """Tokens in one row each, mapped from their files where they come from shards."""

    train: list[np.ndarray]
    held_out: np.ndarray
    vocabulary: int


@functools.lru_cache(maxsize=1)
def load_text(source: str) -> Text:
    """Read `source`: "python", or a folder with fineweb_train_*.bin and fineweb_val_*.bin.

    Raises:
        UserError: files are missing or not of that format.
    """
    return _standard_library() if source == STANDARD_LIBRARY else _shards(Path(source))


def _standard_library() -> Text:
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if not SKIPPED_NAMES & set(path.relative_to(root).parts)]
    records = [record for path in files for record in read_records(path)]
    texts = [record.text.encode() for record in records if record.text]
    every = round(1 / HELD_OUT_SHARE)
    train, held_out = (
        np.frombuffer(b"\n".join(text for index, text in enumerate(texts) if (index % every == 0) is held), np.uint8)
        for held in (False, True)
    )
    return Text([train], held_out, BYTES)


def _shards(folder: Path) -> Text:
    found = {kind: sorted(folder.glob(f"*_{kind}_*.bin")) for kind in ("train", "val")}
    for kind, paths in found.items():
        if not paths:
            raise UserError(
                f"{folder} has no *_{kind}_*.bin: --data must be {STANDARD_LIBRARY}, or a folder of FineWeb shards as "
                "NanoGPT's speedrun reads them"
            )
    return Text([read_shard(path) for path in found["train"]], read_shard(found["val"][0]), GPT2_TOKENS)


def read_shard(path: Path) -> np.ndarray:
    """The tokens of one shard, uint16 [tokens], mapped.

    Raises:
        UserError: it is no such file, or cut off.
    """
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if len(header) < HEADER_INTS or header[0] != MAGIC or header[1] != VERSION:
        raise UserError(f"{path} is no shard: it must begin with the int32 {MAGIC} and {VERSION}")
    count, size = int(header[2]), path.stat().st_size
    if size != 4 * HEADER_INTS + 2 * count:
        raise UserError(f"{path} says it has {count} tokens and is {size} bytes long: it was cut off or changed")
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS)


def draw(tokens: list[np.ndarray], count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Windows at random places, int64 [count, length + 1]: a window's tokens and, shifted by one, what follows them."""
    sizes = np.array([max(0, len(part) - length) for part in tokens])
    if not sizes.sum():
        raise UserError(f"the text has fewer than {length + 1} tokens in a row: give more text")
    ends = np.cumsum(sizes)
    places = torch.randint(int(ends[-1]), (count,), generator=generator).numpy()
    windows = []
    for place in places:
        number = int(np.searchsorted(ends, place, side="right"))
        start = int(place - (ends[number] - sizes[number]))
        windows.append(tokens[number][start : start + length + 1].astype(np.int64))
    return torch.from_numpy(np.stack(windows))


def in_order(tokens: np.ndarray, count: int, length: int) -> torch.Tensor:
    """The first `count` windows one after another, int64 [at most count, length + 1]."""
    count = min(count, (len(tokens) - 1) // length)
    if count < 1:
        raise UserError(f"the held-out text has {len(tokens)} tokens: it must have at least {length + 1}")
    windows = [tokens[number * length : (number + 1) * length + 1].astype(np.int64) for number in range(count)]
    return torch.from_numpy(np.stack(windows))
