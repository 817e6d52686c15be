"""Prepare conversations: token ids on disk, packed into sequences, with a loss mask and a manifest.

The format is that of `prepare`, but a sequence of the index is a conversation and a document of the index is a window.
A window is a group of complete conversations with at most the sequence length of the run in tokens.
"""

import contextlib
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy

from moonlight.data.chat_render import ChatEncoder, find_template
from moonlight.data.chat_template import TEMPLATE_FILE
from moonlight.data.conversations import check_files, parse_messages, read_conversations
from moonlight.data.documents import fingerprint
from moonlight.data.encode import encode_all
from moonlight.data.intake import RecordBatcher
from moonlight.data.manifest import MANIFEST_FILE, VERSION, check_same, load_manifest
from moonlight.data.packing import pack
from moonlight.data.prepare import check_settings, check_splits, hash_position, import_indexed_dataset, list_input_files
from moonlight.errors import UserError
from moonlight.files import atomic_folder, atomic_write_text, sha256_checksum, write_json
from moonlight.progress import byte_progress


def prepare_chat(
    inputs: Sequence[Path],
    tokenizer_folder: Path,
    out: Path,
    *,
    sequence_length: int,
    template: str = "own",
    messages_field: str = "messages",
    validation_share: float = 0.05,
    packing: bool = True,
    workers: int = 1,
    max_bad_share: float = 1.0,
    license: str = "unknown",
) -> dict[str, Any]:
    """Render, encode and pack conversations into the data folder `out`; if `out` has them already, print so and return.

    `out` contains `train.bin/.idx/.mask` and `validation.bin/.idx/.mask`, the chat template, `manifest.json`, and
    `quarantine.jsonl` if there are unusable conversations. A `.mask` file has one byte per token: 1 if the loss covers
    the token. `out` is written atomically. The hash of a conversation's messages determines its split.

    Args:
        inputs: .jsonl and .jsonl.gz files, or folders of them.
        tokenizer_folder: folder of any tokenizer that `Tokenizer.load` reads.
        out: folder to write.
        sequence_length: sequence length of the run, in tokens; a longer conversation is unusable.
        template: own (the tokenizer folder's, or Moonlight's if it has none) or moonlight.
        messages_field: JSON key of the list of messages.
        validation_share: fraction of conversations held out, at least 0 and less than 1.
        packing: False puts every conversation into a separate sequence.
        workers: encoding processes; 1 encodes in this process.
        max_bad_share: largest accepted fraction of unusable conversations; with 1, one usable conversation suffices.
        license: recorded in the manifest for every source.

    Returns:
        The manifest. In a split, `documents` counts conversations, `windows` the packed sequences, `tokens` all ids,
        `counted_tokens` the ids that the loss covers, `bytes` the UTF-8 text of the messages. `bad_by_reason` counts
        the unusable conversations of each kind.

    Raises:
        UserError: a setting is out of range, there is no usable conversation, a split is empty, inputs, tokenizer or
            template cannot be read, or `out` exists with different content.
    """
    check_settings(validation_share, workers, max_bad_share)
    if sequence_length < 2:
        raise UserError(f"sequence_length is {sequence_length}: it must be at least 2")
    template_text = find_template(tokenizer_folder, template)
    encoder = ChatEncoder(tokenizer_folder, template_text)
    tokenizer = encoder.tokenizer
    files_by_input = list_input_files(inputs)
    all_files = [file for files in files_by_input for file in files]
    check_files(all_files)
    expected = {
        "version": VERSION,
        "settings": {
            "messages_field": messages_field,
            "validation_share": validation_share,
            "max_bad_share": max_bad_share,
            "license": license,
        },
        "inputs_sha256": fingerprint(all_files),
        "tokenizer": {"sha256": tokenizer.sha256, "num_ids": tokenizer.num_ids, "eos_id": tokenizer.eos_id},
        "chat": {
            "template_sha256": hashlib.sha256(template_text.encode()).hexdigest(),
            "end_token": encoder.renderer.end_token,
            "sequence_length": sequence_length,
            "packing": packing,
        },
    }
    if out.exists():
        check_same(out, expected)
        print(f"{out}: these conversations have been prepared already")
        return load_manifest(out)

    sources: list[dict[str, Any]] = [
        {"path": str(path), "license": license, "documents": 0, "bytes": 0, "tokens": 0} for path in inputs
    ]
    with atomic_folder(out) as part:
        batcher = RecordBatcher(part / "quarantine.jsonl", partial(read_conversations, field=messages_field))
        names = ("train", "validation") if validation_share else ("train",)
        splits = {name: _Split(part, name) for name in names}
        total = sum(file.stat().st_size for file in all_files)
        with byte_progress("preparing", total) as advance, contextlib.closing(batcher):
            for batch, encoded in encode_all(batcher.batches(files_by_input), encoder, workers):
                for source, raw, location, result in zip(
                    batch.sources, batch.raw, batch.locations, encoded, strict=True
                ):
                    if isinstance(result, str):
                        batcher.reject(location, result)
                        continue
                    if (length := result.shape[1]) > sequence_length:
                        batcher.reject(location, f"longer than the sequence: {length} tokens, {sequence_length} fit")
                        continue
                    nbytes = sum(len(message["content"].encode()) for message in parse_messages(raw.decode()))
                    is_held_out = hash_position(raw) < validation_share
                    splits["validation" if is_held_out else "train"].add(result, nbytes)
                    for key, count in (("documents", 1), ("bytes", nbytes), ("tokens", length)):
                        sources[source][key] += count
                advance(batch.position)
        batcher.check(max_bad_share)
        split_entries = {
            name: split.finish(tokenizer.num_ids, sequence_length, packing) for name, split in splits.items()
        }
        check_splits(split_entries, validation_share, inputs)
        atomic_write_text(part / TEMPLATE_FILE, template_text)
        manifest = {
            **expected,
            "sources": sources,
            "splits": split_entries,
            "bad_records": batcher.bad,
            "bad_by_reason": dict(batcher.reasons.most_common()),
            "first_bad": batcher.first_bad,
            "empty_documents": batcher.empty,
        }
        write_json(part / MANIFEST_FILE, manifest)
    return manifest


class _Split:
    """Writer of one split. Conversations go to temporary files first, because packing needs the lengths of all."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._unpacked = {kind: folder / f".{name}.{kind}" for kind in ("ids", "learnt")}
        self._files = {kind: path.open("wb") for kind, path in self._unpacked.items()}
        self._lengths: list[int] = []
        self._bytes = 0

    def add(self, rendered: numpy.ndarray, nbytes: int) -> None:
        """Append one conversation: int32 [2, tokens], ids and loss mask. `nbytes` is the size of its messages."""
        self._files["ids"].write(rendered[0].tobytes())
        self._files["learnt"].write(rendered[1].astype(numpy.uint8).tobytes())
        self._lengths.append(rendered.shape[1])
        self._bytes += nbytes

    def finish(self, num_ids: int, sequence_length: int, packing: bool) -> dict[str, Any]:
        """Write the packed files and return the split's entry of the manifest."""
        for file in self._files.values():
            file.close()
        entry = {"documents": len(self._lengths), "bytes": self._bytes, "tokens": sum(self._lengths)}
        if self._lengths:
            count = len(self._lengths)
            windows = pack(self._lengths, sequence_length) if packing else [[index] for index in range(count)]
            entry |= {"windows": len(windows), **self._write(windows, num_ids)}
        for path in self._unpacked.values():
            path.unlink()
        return entry

    def _write(self, windows: list[list[int]], num_ids: int) -> dict[str, Any]:
        indexed_dataset = import_indexed_dataset()
        dtype = indexed_dataset.DType.optimal_dtype(num_ids)
        paths = {kind: self._folder / f"{self._name}.{kind}" for kind in ("bin", "idx", "mask")}
        builder = indexed_dataset.IndexedDatasetBuilder(str(paths["bin"]), dtype)
        ids = numpy.memmap(self._unpacked["ids"], numpy.int32, "r")
        loss_mask = numpy.memmap(self._unpacked["learnt"], numpy.uint8, "r")
        ends = numpy.cumsum(self._lengths, dtype=numpy.int64)
        counted = 0
        with paths["mask"].open("wb") as mask:
            for window in windows:
                spans = [slice(ends[index] - self._lengths[index], ends[index]) for index in window]
                builder.add_document(
                    numpy.concatenate([ids[span] for span in spans]), [self._lengths[index] for index in window]
                )
                for span in spans:
                    mask.write(loss_mask[span].tobytes())
                    counted += int(loss_mask[span].sum(dtype=numpy.int64))
        builder.finalize(str(paths["idx"]))
        checksums = {f"{kind}_sha256": sha256_checksum(path) for kind, path in paths.items()}
        return {"counted_tokens": counted, "largest_id": int(ids.max()), "dtype": dtype.__name__, **checksums}
