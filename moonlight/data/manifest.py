"""Load the manifest of a data folder and check it against the files of the folder."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy

from moonlight.data.tokenizer import Tokenizer
from moonlight.errors import UserError
from moonlight.files import output_conflict_error

VERSION = 2
MANIFEST_FILE = "manifest.json"


def load_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a data folder; raise UserError if it, or a file that it lists, is missing or corrupt."""
    path = folder / MANIFEST_FILE
    hint = "make the folder with `moonlight data prepare`"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"data {path}: {error.strerror or error}; {hint}") from None
    except ValueError:
        raise UserError(f"data {path} is not JSON; {hint}") from None
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise UserError(f"data {path} is not a data manifest of version {VERSION}; {hint}")
    if is_chat(manifest):
        hint = hint.replace("prepare", "prepare-chat")
    try:
        sizes = _check_fields(manifest)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"data {path} is corrupt: a field is missing or invalid; {hint} again") from None
    for name, size in sizes.items():
        if not (folder / name).is_file():
            raise UserError(f"data {folder} has no {name}, which its manifest lists; {hint} again")
        actual = (folder / name).stat().st_size
        if actual != size:
            raise UserError(f"data {folder / name} is corrupt: it has {actual} bytes instead of {size}; {hint} again")
    return manifest


def _check_fields(manifest: dict[str, Any]) -> dict[str, int]:
    """Return the sizes in bytes of the files that the manifest describes.

    Checks every field that a training run needs; raises KeyError, TypeError, ValueError or AttributeError.
    """
    tokenizer, splits, chat = manifest["tokenizer"], manifest["splits"], manifest.get("chat")
    counts = [tokenizer["num_ids"], tokenizer["eos_id"] + 1]
    sizes = {}
    for name, split in splits.items():
        counts += [split["documents"], split["bytes"], split["tokens"], split["largest_id"] + 1]
        sizes[f"{name}.bin"] = split["tokens"] * numpy.dtype(split["dtype"]).itemsize
        # Megatron's header, then length and offset of each document, then the indices of documents.
        sizes[f"{name}.idx"] = 34 + 12 * split["documents"] + 8 * (split["documents"] + 1)
        if chat:  # a document of the index is a window of conversations
            sizes[f"{name}.idx"] += 8 * (split["windows"] - split["documents"])
            sizes[f"{name}.mask"] = split["tokens"]
            counts += [split["windows"], split["counted_tokens"]]
    if chat:
        counts.append(chat["sequence_length"])
        if not isinstance(chat["end_token"], str):
            raise ValueError
    elif "validation" in splits:
        counts += [splits["validation"][f"{name}_bytes"] for name in ("compressed_text", "gzip", "xz")]
    if "train" not in splits or not isinstance(tokenizer["sha256"], str):
        raise ValueError
    if not all(type(count) is int and count > 0 for count in counts):
        raise ValueError
    return sizes


def is_chat(manifest: dict[str, Any]) -> bool:
    """Return whether the manifest describes conversations."""
    return "chat" in manifest


def held_out_counts(manifests: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Return the total documents, bytes, tokens and compressed sizes of the held-out text of several data folders."""
    splits = [manifest["splits"]["validation"] for manifest in manifests]
    names = ("documents", "bytes", "tokens", "compressed_text_bytes", "gzip_bytes", "xz_bytes")
    return {name: sum(split[name] for split in splits) for name in names}


def check_tokenizer(folder: Path, manifest: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Raise UserError unless the data in `folder`, which `manifest` describes, was encoded with `tokenizer`."""
    expected = manifest["tokenizer"]["sha256"]
    if expected != tokenizer.sha256:
        raise UserError(
            f"data {folder} was prepared with the tokenizer of checksum {expected[:12]}, this one has "
            f"{tokenizer.sha256[:12]}: give the same tokenizer, or prepare the data again"
        )


def check_same(out: Path, expected: dict[str, Any]) -> None:
    """Raise UserError unless the manifest of the folder `out` contains all items of `expected`."""
    try:
        manifest = json.loads((out / MANIFEST_FILE).read_text(encoding="utf-8"))
        same = all(manifest.get(key) == value for key, value in expected.items())
    except (OSError, ValueError, AttributeError):
        same = False
    if not same:
        raise output_conflict_error(out)
