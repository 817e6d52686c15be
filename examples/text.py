"""Tokens for a language model: bytes of Python's standard library, or FineWeb shards of the NanoGPT speedrun."""

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
"""Vocabulary size: 50,257, padded to a multiple of 128."""
MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
"""A shard starts with 256 int32: magic, version, number of tokens, zeros. The tokens follow, as uint16."""
HELD_OUT_FRACTION = 0.05


@dataclass(frozen=True)
class Text:
    """Tokens of the training shards and of the held-out text, one-dimensional; shards are memory-mapped."""

    train: list[np.ndarray]
    held_out: np.ndarray
    vocabulary: int


@functools.lru_cache(maxsize=1)
def load_text(source: str) -> Text:
    """Read `source`: "python", or a folder with fineweb_train_*.bin and fineweb_val_*.bin.

    Raises:
        UserError: files are missing or invalid.
    """
    return _standard_library() if source == STANDARD_LIBRARY else _shards(Path(source))


def _standard_library() -> Text:
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if not SKIPPED_NAMES & set(path.relative_to(root).parts)]
    records = [record for path in files for record in read_records(path)]
    texts = [record.text.encode() for record in records if record.text]
    every = round(1 / HELD_OUT_FRACTION)
    train, held_out = (
        np.frombuffer(
            b"\n".join(text for index, text in enumerate(texts) if (index % every == 0) is is_held_out), np.uint8
        )
        for is_held_out in (False, True)
    )
    return Text([train], held_out, BYTES)


def _shards(folder: Path) -> Text:
    paths_by_kind = {kind: sorted(folder.glob(f"*_{kind}_*.bin")) for kind in ("train", "val")}
    for kind, paths in paths_by_kind.items():
        if not paths:
            raise UserError(
                f"{folder} has no *_{kind}_*.bin: --data must be {STANDARD_LIBRARY}, or a folder of FineWeb shards in "
                "the format of the NanoGPT speedrun"
            )
    return Text([read_shard(path) for path in paths_by_kind["train"]], read_shard(paths_by_kind["val"][0]), GPT2_TOKENS)


def read_shard(path: Path) -> np.ndarray:
    """Memory-map the tokens of one shard, uint16 [tokens].

    Raises:
        UserError: the file is not a shard, or is truncated.
    """
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if len(header) < HEADER_INTS or header[0] != MAGIC or header[1] != VERSION:
        raise UserError(f"{path} is not a shard: it must start with the int32 {MAGIC} and {VERSION}")
    count, size = int(header[2]), path.stat().st_size
    if size != 4 * HEADER_INTS + 2 * count:
        raise UserError(f"{path} has {size} bytes, its header states {count} tokens: it is truncated or was changed")
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS)


def draw(tokens: list[np.ndarray], count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Sample random windows, int64 [count, length + 1]: the first `length` tokens are inputs, the last ones targets.

    Raises:
        UserError: no shard has more than `length` tokens.
    """
    sizes = np.array([max(0, len(shard) - length) for shard in tokens])
    if not sizes.sum():
        raise UserError(f"the text has fewer than {length + 1} tokens in a row: give more text")
    ends = np.cumsum(sizes)
    positions = torch.randint(int(ends[-1]), (count,), generator=generator).numpy()
    windows = []
    for position in positions:
        index = int(np.searchsorted(ends, position, side="right"))
        start = int(position - (ends[index] - sizes[index]))
        windows.append(tokens[index][start : start + length + 1].astype(np.int64))
    return torch.from_numpy(np.stack(windows))


def in_order(tokens: np.ndarray, count: int, length: int) -> torch.Tensor:
    """Return the first `count` consecutive windows, int64 [at most count, length + 1].

    Raises:
        UserError: the text is shorter than one window.
    """
    count = min(count, (len(tokens) - 1) // length)
    if count < 1:
        raise UserError(f"the held-out text has {len(tokens)} tokens: it must have at least {length + 1}")
    windows = [tokens[index * length : (index + 1) * length + 1].astype(np.int64) for index in range(count)]
    return torch.from_numpy(np.stack(windows))
