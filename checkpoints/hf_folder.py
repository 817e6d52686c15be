"""Reader of a Hugging Face folder of safetensors; it runs no code of the folder."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from checkpoints.hf_config import CONFIG_FILE
from moonlight.errors import UserError, attach_path
from moonlight.files import SUMS_FILE, read_sums, sha256_checksum
from moonlight.progress import track_progress

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
GENERATION_FILE = "generation_config.json"
STALE_SUFFIX = ".rotary_emb.inv_freq"
"""Suffix of tensors that old versions of transformers saved; the configuration determines them."""
_MAKE_AGAIN = "download or export the folder again"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the folder, read on demand."""

    file: Path
    dtype: str
    """Name in safetensors: F32, BF16, ..."""
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    """Return the values, memory-mapped from the file."""


@dataclass(frozen=True)
class HuggingFaceFolder:
    """An opened folder, with its configuration and tensors."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    files: list[str]
    """Names of the model's files: config.json, the index if it exists, the safetensors files."""


def open_folder(path: Path) -> HuggingFaceFolder:
    """Check and open a folder with config.json and safetensors, in one file or in shards.

    Raises:
        UserError: a file or tensor is missing, corrupt, duplicated, not listed in the index, or a pickle.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a Hugging Face folder: give one with config.json and safetensors files")
    config = read_json_strict(path / CONFIG_FILE)
    index = path / INDEX_FILE
    if index.exists():
        owners = _read_weight_map(index)
    elif (path / SINGLE_FILE).exists():
        owners = None
    elif pickles := sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in path.glob(kind)):
        raise UserError(f"{path / pickles[0]} is a pickle, which can run code: only safetensors files are accepted")
    else:
        raise UserError(f"{path} has neither {INDEX_FILE} nor {SINGLE_FILE}: only safetensors folders are accepted")
    names = sorted(set(owners.values())) if owners is not None else [SINGLE_FILE]
    for name in names:
        if not (path / name).is_file():
            raise UserError(f"{path} lacks {name}, which {INDEX_FILE} names: {_MAKE_AGAIN}")
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        for key, tensor in _read_tensors(path / name).items():
            if key in tensors:
                raise UserError(f"{key} is in {tensors[key].file} and in {path / name}: it must be in one file")
            tensors[key] = tensor
    if owners is not None:
        for key, tensor in tensors.items():
            if owners.get(key) != tensor.file.name:
                raise UserError(f"{index} places {key} in {owners.get(key, 'no file')}, it is in {tensor.file.name}")
        if missing := sorted(owners.keys() - tensors.keys()):
            raise UserError(f"{path / owners[missing[0]]} lacks {missing[0]}, which {INDEX_FILE} places there")
    return HuggingFaceFolder(
        path, config, tensors, [CONFIG_FILE, *([INDEX_FILE] if owners is not None else []), *names]
    )


def read_json_strict(path: Path) -> dict[str, Any]:
    """Read a JSON object without duplicate keys.

    Raises:
        UserError: the file is missing, is not a JSON object, or has a duplicate key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not a Hugging Face folder: it has no {path.name}") from None
    except _DuplicateKeyError as error:
        raise UserError(f"{path} is corrupt: it has the key {error} twice; {_MAKE_AGAIN}") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is corrupt: it is not a JSON object; {_MAKE_AGAIN}")
    return content


def _read_weight_map(index: Path) -> dict[str, str]:
    owners = read_json_strict(index).get("weight_map")
    if not owners or not isinstance(owners, dict) or not all(type(name) is str for name in owners.values()):
        raise UserError(f"{index} is corrupt: it has no weight_map from tensors to files")
    for name in owners.values():
        if not re.fullmatch(r"[\w][\w.-]*\.safetensors", name):
            raise UserError(f"{index} names {name[:100]!r}: it must be a safetensors file in the folder")
    return owners


class _DuplicateKeyError(ValueError):
    """A JSON object has a key twice; parsers differ in which value they take."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise _DuplicateKeyError(repr(key[:100]))
        content[key] = value
    return content


def check_listed_sums(folder: HuggingFaceFolder) -> None:
    """Compare the model's files with `SHA256SUMS` of the folder, if it exists.

    Raises:
        UserError: a file differs.
    """
    if not (folder.path / SUMS_FILE).exists():
        return
    sums = read_sums(folder.path / SUMS_FILE)
    listed = [name for name in folder.files if name in sums]
    for name in track_progress(listed, "checksums"):
        if sha256_checksum(folder.path / name) != sums[name]:
            raise UserError(
                f"{folder.path / name} does not match its checksum in {SUMS_FILE}: it is corrupt or was changed"
            )


def _read_tensors(file: Path) -> dict[str, StoredTensor]:
    try:
        # safetensors reports an unreadable file as missing, and accepts two tensors of the same name.
        with attach_path(file), file.open("rb") as raw:
            handle = safe_open(file, framework="pt")
            json.loads(raw.read(int.from_bytes(raw.read(8), "little")), object_pairs_hook=_object)
        tensors = {}
        for key in handle.keys():  # noqa: SIM118  (a safetensors handle is not a mapping)
            view = handle.get_slice(key)
            shape = tuple(view.get_shape())
            tensors[key] = StoredTensor(file, view.get_dtype(), shape, partial(handle.get_tensor, key))
    except _DuplicateKeyError as error:
        raise UserError(f"{file} is corrupt: its header has the key {error} twice") from None
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is corrupt: {error}") from None
    return tensors
