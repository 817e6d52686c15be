"""Prepare text: documents to token ids on disk, in Megatron's indexed dataset format, with a manifest.

This process reads, splits and writes; `encode` distributes the encoding over worker processes.
"""

import contextlib
import hashlib
import lzma
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy

from moonlight.data.chat_render import ChatEncoder
from moonlight.data.documents import Record, fingerprint, iter_files, read_records
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
    num_ids = encoder.tokenizer.num_ids
    return write_data(
        inputs,
        list_input_files(inputs),
        encoder,
        out,
        settings={
            "text_field": text_field,
            "validation_share": validation_share,
            "max_bad_share": max_bad_share,
            "license": license,
        },
        workers=workers,
        read=partial(read_records, text_field=text_field),
        open_split=lambda folder, name: _TextSplit(folder, name, num_ids),
        present=f"{out}: this data has been prepared already",
    )


def write_data(
    inputs: Sequence[Path],
    files_by_input: list[list[Path]],
    encoder: TextEncoder | ChatEncoder,
    out: Path,
    *,
    settings: dict[str, Any],
    workers: int,
    read: Callable[[Path], Iterator[Record]],
    open_split: Callable[[Path, str], Any],
    present: str,
    count_bytes: Callable[[bytes], int] = len,
    chat: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Encode the files of `inputs` and write the data folder `out` with its manifest, which is returned.

    Args:
        settings: recorded in the manifest; `validation_share`, `max_bad_share` and `license` are used.
        read: yields the records of a file.
        open_split: returns the writer of a split, from folder and name. Its `add(text, encoded)` appends a document,
            its `finish()` writes the files and returns the split's entry of the manifest without the totals.
        present: message to print if `out` already has this data.
        count_bytes: returns the size of a document's text.
        chat: section of the manifest for conversations; None for text.

    Raises:
        UserError: there are no documents, a split is empty, too many records are bad, or `out` has other content.
    """
    all_files = [file for files in files_by_input for file in files]
    tokenizer, validation_share = encoder.tokenizer, settings["validation_share"]
    expected = {
        "version": VERSION,
        "settings": settings,
        "inputs_sha256": fingerprint(all_files),
        "tokenizer": {"sha256": tokenizer.sha256, "num_ids": tokenizer.num_ids, "eos_id": tokenizer.eos_id},
        **({"chat": chat} if chat else {}),
    }
    if out.exists():
        check_same(out, expected)
        print(present)
        return load_manifest(out)

    zero = {"documents": 0, "bytes": 0, "tokens": 0}
    sources: list[dict[str, Any]] = [{"path": str(path), "license": settings["license"], **zero} for path in inputs]
    with atomic_folder(out) as part:
        batcher = RecordBatcher(part / "quarantine.jsonl", read)
        splits = {name: open_split(part, name) for name in ("train", "validation")[: 2 if validation_share else 1]}
        totals = {name: dict(zero) for name in splits}
        total = sum(file.stat().st_size for file in all_files)
        with byte_progress("preparing", total) as advance, contextlib.closing(batcher):
            for batch, results in encode_all(batcher.batches(files_by_input), encoder, workers):
                documents = zip(batch.sources, batch.raw, batch.locations, results, strict=True)
                for source, raw, location, encoded in documents:
                    if isinstance(encoded, str):
                        batcher.reject(location, encoded)
                        continue
                    name = "validation" if _hash_position(raw) < validation_share else "train"
                    splits[name].add(raw, encoded)
                    counts = {"documents": 1, "bytes": count_bytes(raw), "tokens": encoded.shape[-1]}
                    for key, count in counts.items():
                        sources[source][key] += count
                        totals[name][key] += count
                advance(batch.position)
        batcher.check(settings["max_bad_share"])
        for name in splits:
            if not totals[name]["documents"]:
                raise UserError(
                    f"validation_share is {validation_share}: no document of {', '.join(map(str, inputs))} falls "
                    f"into {name}; choose another --validation-share, or 0 for no held-out documents"
                )
        manifest = {
            **expected,
            "sources": sources,
            "splits": {name: totals[name] | split.finish() for name, split in splits.items()},
            "bad_records": batcher.bad,
            **({"bad_by_reason": dict(batcher.reasons.most_common()), "first_bad": batcher.first_bad} if chat else {}),
            "empty_documents": batcher.empty,
        }
        write_json(part / MANIFEST_FILE, manifest)
    return manifest


class _TextSplit:
    """Writer of one .bin/.idx pair; also compresses the held-out text."""

    def __init__(self, folder: Path, name: str, num_ids: int) -> None:
        indexed_dataset = import_indexed_dataset()
        self._dtype = indexed_dataset.DType.optimal_dtype(num_ids)
        self._bin, self._idx = folder / f"{name}.bin", folder / f"{name}.idx"
        self._builder = indexed_dataset.IndexedDatasetBuilder(str(self._bin), self._dtype)
        self._largest_id = 0
        self._compressed = _Compressed() if name == "validation" else None

    def add(self, raw: bytes, encoded: numpy.ndarray) -> None:
        """Append one document; `encoded` is int32 [tokens] and ends with [EOS]."""
        self._builder.add_document(encoded, [len(encoded)])
        self._largest_id = max(self._largest_id, int(encoded.max()))
        if self._compressed:
            self._compressed.add(raw)

    def finish(self) -> dict[str, Any]:
        self._builder.finalize(str(self._idx))
        checksums = {"bin_sha256": sha256_checksum(self._bin), "idx_sha256": sha256_checksum(self._idx)}
        sizes = self._compressed.sizes() if self._compressed else {}
        return {"largest_id": self._largest_id, "dtype": self._dtype.__name__, **checksums, **sizes}


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


def _hash_position(raw: bytes) -> float:
    """Return the hash of a document's text as a number from 0 to 1."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big") / 2**64


def import_indexed_dataset() -> Any:
    """Import Megatron's indexed dataset module, without its warnings about optional packages and without a compiler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

        from megatron.core.datasets import indexed_dataset
    return indexed_dataset
