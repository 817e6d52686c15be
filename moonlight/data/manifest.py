"""The manifest of a data folder, checked against the files beside it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy

from moonlight.data.tokenizer import Tokenizer
from moonlight.errors import UserError

VERSION = 2


def load_manifest(folder: Path) -> dict[str, Any]:
    """Manifest of a data folder; raise UserError if it, or a file that belongs there, is missing or damaged."""
    path = folder / "manifest.json"
    hint = "make the folder with `moonlight data prepare`"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"data {path}: {error.strerror or error}; {hint}") from None
    except ValueError:
        raise UserError(f"data {path} is not JSON; {hint}") from None
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise UserError(f"data {path} is not a data manifest of version {VERSION}; {hint}")
    try:
        sizes = _check_fields(manifest)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"data {path} is damaged: it does not hold what was written; {hint} again") from None
    for name, size in sizes.items():
        if not (folder / name).is_file():
            raise UserError(f"data {folder} has no {name}, which its manifest names; {hint} again")
        found = (folder / name).stat().st_size
        if found != size:
            raise UserError(f"data {folder / name} is damaged: it has {found} bytes instead of {size}; {hint} again")
    return manifest


def _check_fields(manifest: dict[str, Any]) -> dict[str, int]:
    """Sizes in bytes of the files that the manifest describes, after checking all that a training run needs of it."""
    tokenizer, splits, chat = manifest["tokenizer"], manifest["splits"], manifest.get("chat")
    counts = [tokenizer["num_ids"], tokenizer["eos_id"] + 1]
    sizes = {}
    for name, split in splits.items():
        counts += [split["documents"], split["bytes"], split["tokens"], split["largest_id"] + 1]
        sizes[f"{name}.bin"] = split["tokens"] * numpy.dtype(split["dtype"]).itemsize
        # Megatron's header, then length and place of each document, then the numbers of documents.
        sizes[f"{name}.idx"] = 34 + 12 * split["documents"] + 8 * (split["documents"] + 1)
        if chat:  # of conversations, several of which are one document of the index
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
    """Whether the folder holds conversations."""
    return "chat" in manifest


def held_out_counts(manifests: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Documents, bytes, tokens and compressed sizes of the held-out text of several data folders together."""
    splits = [manifest["splits"]["validation"] for manifest in manifests]
    names = ("documents", "bytes", "tokens", "compressed_text_bytes", "gzip_bytes", "xz_bytes")
    return {name: sum(split[name] for split in splits) for name in names}


def check_tokenizer(folder: Path, manifest: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Raise UserError unless the data in `folder`, which `manifest` describes, was made with `tokenizer`."""
    made_with = manifest["tokenizer"]["sha256"]
    if made_with != tokenizer.sha256:
        raise UserError(
            f"data {folder} was prepared with the tokenizer of checksum {made_with[:12]}, this one has "
            f"{tokenizer.sha256[:12]}: give the same tokenizer, or prepare the data again"
        )


def check_same(out: Path, wanted: dict[str, Any]) -> None:
    """Raise UserError unless `out` holds what `wanted` would make."""
    try:
        found = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        same = all(found.get(key) == value for key, value in wanted.items())
    except (OSError, ValueError, AttributeError):
        same = False
    if not same:
        raise UserError(f"{out} exists with something else in it: choose another folder, or remove it")
