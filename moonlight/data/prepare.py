"""Documents to token ids on disk, in Megatron's indexed dataset format, with a manifest that describes them.

This process reads, splits and writes; `encode` spreads the encoding over others.
"""

import contextlib
import hashlib
import lzma
import warnings
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy

from moonlight.data.documents import fingerprint, iter_files, read_records
from moonlight.data.encode import TextEncoder, encode_all
from moonlight.data.intake import RecordBatcher
from moonlight.data.manifest import VERSION, check_same, load_manifest
from moonlight.errors import UserError
from moonlight.files import atomic_folder, sha256_checksum, write_json
from moonlight.progress import byte_progress

_COMPRESSED_BYTES = 64 << 20
"""Held-out text that gzip and xz are measured on, at most: xz -9 looks back no further and reads 2-3 MB/s."""


def prepare(
    inputs: Sequence[Path],
    tokenizer_folder: Path,
    out: Path,
    *,
    text_field: str = "text",
    validation_share: float = 0.06,
    workers: int = 1,
    max_bad_share: float = 0.01,
    license: str = "unknown",
) -> dict[str, Any]:
    """Encode `inputs` and write the data folder `out`; say so and return if it is there already.

    `out` gets `train.bin/.idx` and `validation.bin/.idx` (uint16 up to 65,499 ids, int32 above; a document is
    its ids and the tokenizer's [EOS]), `manifest.json`, and `quarantine.jsonl` if there are bad records. It
    appears whole or not at all. A document belongs to the split that the hash of its text says, so added
    files move none, and copies of one document never lie on both sides.

    Args:
        validation_share: share of documents held out, at least 0 and less than 1; with 0 there is no
            validation split.
        workers: encoding processes; 1 encodes in this process.
        max_bad_share: largest share of records that may be bad.
        license: noted in the manifest for every source.

    Returns:
        The manifest. `tokens` counts the [EOS] ids, `bytes` is UTF-8 text, `largest_id` is the largest that
        occurs. For the held-out text, documents joined with nothing between, `gzip_bytes` and `xz_bytes` are
        its sizes under `gzip -9` and `xz -9`, measured on its first `compressed_text_bytes`.

    Raises:
        UserError: a setting out of range, no documents, an empty split, too many bad records, unreadable
            inputs or tokenizer, or `out` exists with something else in it.
    """
    check_settings(validation_share, workers, max_bad_share)
    encoder = TextEncoder(tokenizer_folder)
    tokenizer = encoder.tokenizer
    files_of = list_input_files(inputs)
    all_files = [file for files in files_of for file in files]
    wanted = {
        "version": VERSION,
        "settings": {
            "text_field": text_field,
            "validation_share": validation_share,
            "max_bad_share": max_bad_share,
            "license": license,
        },
        "inputs_sha256": fingerprint(all_files),
        "tokenizer": {"sha256": tokenizer.sha256, "num_ids": tokenizer.num_ids, "eos_id": tokenizer.eos_id},
    }
    if out.exists():
        check_same(out, wanted)
        print(f"{out}: this data has been prepared already")
        return load_manifest(out)

    sources: list[dict[str, Any]] = [
        {"path": str(path), "license": license, "documents": 0, "bytes": 0, "tokens": 0} for path in inputs
    ]
    with atomic_folder(out) as part:
        intake = RecordBatcher(part / "quarantine.jsonl", partial(read_records, text_field=text_field))
        names = ("train", "validation") if validation_share else ("train",)
        splits = {name: _Split(part, name, tokenizer.num_ids) for name in names}
        held_out = _Compressed()
        total = sum(file.stat().st_size for file in all_files)
        with byte_progress("preparing", total) as advance, contextlib.closing(intake):
            for batch, encoded in encode_all(intake.batches(files_of), encoder, workers):
                for source_index, raw, ids in zip(batch.sources, batch.raw, encoded, strict=True):
                    held = hash_position(raw) < validation_share
                    if held:
                        held_out.add(raw)
                    splits["validation" if held else "train"].add(raw, ids)
                    source = sources[source_index]
                    source["documents"] += 1
                    source["bytes"] += len(raw)
                    source["tokens"] += len(ids)
                advance(batch.position)
        intake.check(max_bad_share)
        described = {name: split.finish() for name, split in splits.items()}
        check_splits(described, validation_share, inputs)
        if "validation" in described:
            described["validation"].update(held_out.sizes())
        manifest = {
            **wanted,
            "sources": sources,
            "splits": described,
            "bad_records": intake.bad,
            "empty_documents": intake.empty,
        }
        write_json(part / "manifest.json", manifest)
    return manifest


class _Split:
    """One .bin/.idx pair being written."""

    def __init__(self, folder: Path, name: str, num_ids: int) -> None:
        indexed_dataset = import_indexed_dataset()
        self._dtype = indexed_dataset.DType.optimal_dtype(num_ids)
        self._bin, self._idx = folder / f"{name}.bin", folder / f"{name}.idx"
        self._builder = indexed_dataset.IndexedDatasetBuilder(str(self._bin), self._dtype)
        self._counts = {"documents": 0, "bytes": 0, "tokens": 0}
        self._largest_id = 0

    def add(self, raw: bytes, ids: numpy.ndarray) -> None:
        """Append one document; `ids` is int32 [tokens], its last the [EOS]."""
        self._builder.add_document(ids, [len(ids)])
        for key, more in (("documents", 1), ("bytes", len(raw)), ("tokens", len(ids))):
            self._counts[key] += more
        self._largest_id = max(self._largest_id, int(ids.max()))

    def finish(self) -> dict[str, Any]:
        """Write the index, and give the split's part of the manifest."""
        self._builder.finalize(str(self._idx))
        checksums = {"bin_sha256": sha256_checksum(self._bin), "idx_sha256": sha256_checksum(self._idx)}
        return {**self._counts, "largest_id": self._largest_id, "dtype": self._dtype.__name__, **checksums}


class _Compressed:
    """What gzip -9 and xz -9 would make of a text, without keeping it."""

    def __init__(self) -> None:
        self._compressors: dict[str, Any] = {
            "gzip_bytes": zlib.compressobj(9, wbits=31),
            "xz_bytes": lzma.LZMACompressor(preset=9),
        }
        self._sizes = {"compressed_text_bytes": 0, "gzip_bytes": 0, "xz_bytes": 0}

    def add(self, raw: bytes) -> None:
        raw = raw[: _COMPRESSED_BYTES - self._sizes["compressed_text_bytes"]]
        self._sizes["compressed_text_bytes"] += len(raw)
        for name, compressor in self._compressors.items():
            self._sizes[name] += len(compressor.compress(raw))

    def sizes(self) -> dict[str, int]:
        """Sizes in bytes. Ends the compressors: call it once."""
        for name, compressor in self._compressors.items():
            self._sizes[name] += len(compressor.flush())
        return self._sizes


def list_input_files(inputs: Sequence[Path]) -> list[list[Path]]:
    """The files of each input that are in none before it."""
    found: list[list[Path]] = []
    for path in inputs:
        taken = {file for files in found for file in files}
        found.append([file for file in iter_files([path]) if file not in taken])
    return found


def check_settings(validation_share: float, workers: int, max_bad_share: float) -> None:
    """Raise UserError for a setting that is out of range."""
    if not 0 <= validation_share < 1:
        raise UserError(f"validation_share is {validation_share}: it must be at least 0 and less than 1")
    if not 0 <= max_bad_share <= 1:
        raise UserError(f"max_bad_share is {max_bad_share}: it must be from 0 to 1")
    if workers < 1:
        raise UserError(f"workers is {workers}: it must be at least 1")


def check_splits(splits: dict[str, dict[str, Any]], validation_share: float, inputs: Sequence[Path]) -> None:
    """Raise UserError if a split got no document."""
    for name, split in splits.items():
        if not split["documents"]:
            raise UserError(
                f"validation_share is {validation_share}: no document of {', '.join(map(str, inputs))} falls "
                f"into {name}; choose another --validation-share, or 0 for data that is only trained on"
            )


def hash_position(raw: bytes) -> float:
    """Where a document's text lies between 0 and 1, by its hash."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big") / 2**64


def import_indexed_dataset() -> Any:
    """Megatron's indexed dataset, without its warnings about optional packages, and without a compiler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

        from megatron.core.datasets import indexed_dataset
    return indexed_dataset
