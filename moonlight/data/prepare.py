"""Prepare text: documents to token ids on disk, in Megatron's indexed dataset format, with a manifest.

This process reads, splits and writes; `encode` distributes the encoding over worker processes.
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
from moonlight.data.manifest import MANIFEST_FILE, VERSION, check_same, load_manifest
from moonlight.errors import UserError
from moonlight.files import atomic_folder, sha256_checksum, write_json
from moonlight.progress import byte_progress

_COMPRESSED_BYTES = 64 << 20
"""Maximum held-out text to compress: xz -9 has a window of this size, and compresses 2-3 MB/s."""


def prepare(
    inputs: Sequence[Path],
    tokenizer_folder: Path,
    out: Path,
    *,
    text_field: str = "text",
    validation_share: float = 0.05,
    workers: int = 1,
    max_bad_share: float = 0.01,
    license: str = "unknown",
) -> dict[str, Any]:
    """Encode `inputs` and write the data folder `out`; if `out` already has this data, print so and return.

    `out` contains `train.bin/.idx` and `validation.bin/.idx`, `manifest.json`, and `quarantine.jsonl` if there are bad
    records. Token ids are uint16 up to 65,499 ids, int32 above; a document is its ids and the tokenizer's [EOS]. `out`
    is written atomically. The hash of a document's text determines its split. Added files therefore move no document,
    and copies of a document are in the same split.

    Args:
        inputs: files and folders of text, JSONL or Parquet.
        tokenizer_folder: folder of any tokenizer that `Tokenizer.load` reads.
        out: folder to write.
        text_field: JSONL key or Parquet column that holds the text.
        validation_share: fraction of documents held out, at least 0 and less than 1; with 0 there is no validation
            split.
        workers: encoding processes; 1 encodes in this process.
        max_bad_share: largest accepted fraction of bad records.
        license: recorded in the manifest for every source.

    Returns:
        The manifest. `tokens` includes the [EOS] ids, `bytes` counts UTF-8 text, `largest_id` is the largest id that
        occurs. `gzip_bytes` and `xz_bytes` are the sizes of the held-out text (documents joined without separator)
        under `gzip -9` and `xz -9`, measured on its first `compressed_text_bytes`.

    Raises:
        UserError: a setting is out of range, there are no documents, a split is empty, too many records are bad, inputs
            or tokenizer cannot be read, or `out` exists with different content.
    """
    check_settings(validation_share, workers, max_bad_share)
    encoder = TextEncoder(tokenizer_folder)
    tokenizer = encoder.tokenizer
    files_by_input = list_input_files(inputs)
    all_files = [file for files in files_by_input for file in files]
    expected = {
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
        check_same(out, expected)
        print(f"{out}: this data has been prepared already")
        return load_manifest(out)

    sources: list[dict[str, Any]] = [
        {"path": str(path), "license": license, "documents": 0, "bytes": 0, "tokens": 0} for path in inputs
    ]
    with atomic_folder(out) as part:
        batcher = RecordBatcher(part / "quarantine.jsonl", partial(read_records, text_field=text_field))
        names = ("train", "validation") if validation_share else ("train",)
        splits = {name: _Split(part, name, tokenizer.num_ids) for name in names}
        held_out = _Compressed()
        total = sum(file.stat().st_size for file in all_files)
        with byte_progress("preparing", total) as advance, contextlib.closing(batcher):
            for batch, encoded in encode_all(batcher.batches(files_by_input), encoder, workers):
                for source_index, raw, ids in zip(batch.sources, batch.raw, encoded, strict=True):
                    is_held_out = hash_position(raw) < validation_share
                    if is_held_out:
                        held_out.add(raw)
                    splits["validation" if is_held_out else "train"].add(raw, ids)
                    source = sources[source_index]
                    source["documents"] += 1
                    source["bytes"] += len(raw)
                    source["tokens"] += len(ids)
                advance(batch.position)
        batcher.check(max_bad_share)
        split_entries = {name: split.finish() for name, split in splits.items()}
        check_splits(split_entries, validation_share, inputs)
        if "validation" in split_entries:
            split_entries["validation"].update(held_out.sizes())
        manifest = {
            **expected,
            "sources": sources,
            "splits": split_entries,
            "bad_records": batcher.bad,
            "empty_documents": batcher.empty,
        }
        write_json(part / MANIFEST_FILE, manifest)
    return manifest


class _Split:
    """Writer of one .bin/.idx pair."""

    def __init__(self, folder: Path, name: str, num_ids: int) -> None:
        indexed_dataset = import_indexed_dataset()
        self._dtype = indexed_dataset.DType.optimal_dtype(num_ids)
        self._bin, self._idx = folder / f"{name}.bin", folder / f"{name}.idx"
        self._builder = indexed_dataset.IndexedDatasetBuilder(str(self._bin), self._dtype)
        self._counts = {"documents": 0, "bytes": 0, "tokens": 0}
        self._largest_id = 0

    def add(self, raw: bytes, ids: numpy.ndarray) -> None:
        """Append one document; `ids` is int32 [tokens] and ends with [EOS]."""
        self._builder.add_document(ids, [len(ids)])
        for key, count in (("documents", 1), ("bytes", len(raw)), ("tokens", len(ids))):
            self._counts[key] += count
        self._largest_id = max(self._largest_id, int(ids.max()))

    def finish(self) -> dict[str, Any]:
        """Write the index and return the split's entry of the manifest."""
        self._builder.finalize(str(self._idx))
        checksums = {"bin_sha256": sha256_checksum(self._bin), "idx_sha256": sha256_checksum(self._idx)}
        return {**self._counts, "largest_id": self._largest_id, "dtype": self._dtype.__name__, **checksums}


class _Compressed:
    """Sizes of a text under gzip -9 and xz -9, without storing the text."""

    def __init__(self) -> None:
        self._compressors: dict[str, Any] = {
            "gzip_bytes": zlib.compressobj(9, wbits=31),
            "xz_bytes": lzma.LZMACompressor(preset=9),
        }
        self._sizes = {"compressed_text_bytes": 0, "gzip_bytes": 0, "xz_bytes": 0}

    def add(self, raw: bytes) -> None:
        """Append to the text, up to `_COMPRESSED_BYTES` in total."""
        raw = raw[: _COMPRESSED_BYTES - self._sizes["compressed_text_bytes"]]
        self._sizes["compressed_text_bytes"] += len(raw)
        for name, compressor in self._compressors.items():
            self._sizes[name] += len(compressor.compress(raw))

    def sizes(self) -> dict[str, int]:
        """Return the sizes in bytes. Call it once: it flushes the compressors."""
        for name, compressor in self._compressors.items():
            self._sizes[name] += len(compressor.flush())
        return self._sizes


def list_input_files(inputs: Sequence[Path]) -> list[list[Path]]:
    """Return the files of each input, without files of earlier inputs."""
    files_by_input: list[list[Path]] = []
    for path in inputs:
        earlier = {file for files in files_by_input for file in files}
        files_by_input.append([file for file in iter_files([path]) if file not in earlier])
    return files_by_input


def check_settings(validation_share: float, workers: int, max_bad_share: float) -> None:
    """Raise UserError if a setting is out of range."""
    if not 0 <= validation_share < 1:
        raise UserError(f"validation_share is {validation_share}: it must be at least 0 and less than 1")
    if not 0 <= max_bad_share <= 1:
        raise UserError(f"max_bad_share is {max_bad_share}: it must be from 0 to 1")
    if workers < 1:
        raise UserError(f"workers is {workers}: it must be at least 1")


def check_splits(splits: dict[str, dict[str, Any]], validation_share: float, inputs: Sequence[Path]) -> None:
    """Raise UserError if a split has no document."""
    for name, split in splits.items():
        if not split["documents"]:
            raise UserError(
                f"validation_share is {validation_share}: no document of {', '.join(map(str, inputs))} falls "
                f"into {name}; choose another --validation-share, or 0 for no held-out documents"
            )


def hash_position(raw: bytes) -> float:
    """Return the hash of a document's text as a number from 0 to 1."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big") / 2**64


def import_indexed_dataset() -> Any:
    """Import Megatron's indexed dataset module, without its warnings about optional packages and without a compiler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

        from megatron.core.datasets import indexed_dataset
    return indexed_dataset
