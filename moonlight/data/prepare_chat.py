"""Conversations to token ids on disk, packed into sequences, with a loss mask and a manifest that describes them.

The format is that of `prepare`, but a sequence of the index is a conversation and a document of it a window: whole
conversations whose tokens together are at most the sequence length of the run to come.
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
from moonlight.data.manifest import VERSION, check_same, load_manifest
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
    """Render and encode the conversations of `inputs` and write the data folder `out`; say so if it is there already.

    `out` gets `train.bin/.idx` and `validation.bin/.idx`, `.mask` beside each (a byte a token: 1 where the token is
    learnt), the chat template, `manifest.json`, and `quarantine.jsonl` if there are conversations that cannot be used.
    It appears whole or not at all. A conversation belongs to the split that the hash of its messages says.

    Args:
        sequence_length: of the run, in tokens; a longer conversation cannot be used.
        template: own (the tokenizer folder's, Moonlight's if it has none) or moonlight.
        messages_field: JSON key of the list of messages.
        validation_share: share of conversations held out, at least 0 and less than 1.
        packing: False gives every conversation a sequence of its own.
        workers: encoding processes; 1 encodes in this process.
        max_bad_share: largest share of conversations that may be unusable; by default some must be usable.
        license: noted in the manifest for every source.

    Returns:
        The manifest. Of a split, `documents` are conversations, `windows` the sequences they fill, `tokens` all ids,
        `counted_tokens` those that are learnt, `bytes` the UTF-8 text of the messages. `bad_by_reason` counts kinds.

    Raises:
        UserError: a setting out of range, no usable conversation, an empty split, unreadable inputs, tokenizer or
            template, or `out` exists with something else in it.
    """
    check_settings(validation_share, workers, max_bad_share)
    if sequence_length < 2:
        raise UserError(f"sequence_length is {sequence_length}: at least 2 tokens are needed")
    text = find_template(tokenizer_folder, template)
    encoder = ChatEncoder(tokenizer_folder, text)
    tokenizer = encoder.tokenizer
    files_of = list_input_files(inputs)
    all_files = [file for files in files_of for file in files]
    check_files(all_files)
    wanted = {
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
            "template_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "end_token": encoder.renderer.end_token,
            "sequence_length": sequence_length,
            "packing": packing,
        },
    }
    if out.exists():
        check_same(out, wanted)
        print(f"{out}: these conversations have been prepared already")
        return load_manifest(out)

    sources: list[dict[str, Any]] = [
        {"path": str(path), "license": license, "documents": 0, "bytes": 0, "tokens": 0} for path in inputs
    ]
    with atomic_folder(out) as part:
        intake = RecordBatcher(part / "quarantine.jsonl", partial(read_conversations, field=messages_field))
        names = ("train", "validation") if validation_share else ("train",)
        splits = {name: _Split(part, name) for name in names}
        total = sum(file.stat().st_size for file in all_files)
        with byte_progress("preparing", total) as advance, contextlib.closing(intake):
            for batch, encoded in encode_all(intake.batches(files_of), encoder, workers):
                for source, raw, place, found in zip(batch.sources, batch.raw, batch.places, encoded, strict=True):
                    if isinstance(found, str):
                        intake.reject(place, found)
                        continue
                    if (length := found.shape[1]) > sequence_length:
                        intake.reject(place, f"longer than the sequence: {length} tokens, {sequence_length} fit")
                        continue
                    nbytes = sum(len(message["content"].encode()) for message in parse_messages(raw.decode()))
                    held = hash_position(raw) < validation_share
                    splits["validation" if held else "train"].add(found, nbytes)
                    for key, more in (("documents", 1), ("bytes", nbytes), ("tokens", length)):
                        sources[source][key] += more
                advance(batch.position)
        intake.check(max_bad_share)
        described = {name: split.finish(tokenizer.num_ids, sequence_length, packing) for name, split in splits.items()}
        check_splits(described, validation_share, inputs)
        atomic_write_text(part / TEMPLATE_FILE, text)
        manifest = {
            **wanted,
            "sources": sources,
            "splits": described,
            "bad_records": intake.bad,
            "bad_by_reason": dict(intake.reasons.most_common()),
            "first_bad": intake.first_bad,
            "empty_documents": intake.empty,
        }
        write_json(part / "manifest.json", manifest)
    return manifest


class _Split:
    """Conversations of one split, kept in files as they come, because packing needs the lengths of all."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._came = {kind: folder / f".{name}.{kind}" for kind in ("ids", "learnt")}
        self._files = {kind: path.open("wb") for kind, path in self._came.items()}
        self._lengths: list[int] = []
        self._bytes = 0

    def add(self, rendered: numpy.ndarray, nbytes: int) -> None:
        """Append one conversation: int32 [2, tokens], ids and which are learnt."""
        self._files["ids"].write(rendered[0].tobytes())
        self._files["learnt"].write(rendered[1].astype(numpy.uint8).tobytes())
        self._lengths.append(rendered.shape[1])
        self._bytes += nbytes

    def finish(self, num_ids: int, sequence_length: int, packing: bool) -> dict[str, Any]:
        """Write the packed files, and give the split's part of the manifest."""
        for file in self._files.values():
            file.close()
        described = {"documents": len(self._lengths), "bytes": self._bytes, "tokens": sum(self._lengths)}
        if self._lengths:
            count = len(self._lengths)
            windows = pack(self._lengths, sequence_length) if packing else [[number] for number in range(count)]
            described |= {"windows": len(windows), **self._write(windows, num_ids)}
        for path in self._came.values():
            path.unlink()
        return described

    def _write(self, windows: list[list[int]], num_ids: int) -> dict[str, Any]:
        indexed_dataset = import_indexed_dataset()
        dtype = indexed_dataset.DType.optimal_dtype(num_ids)
        paths = {kind: self._folder / f"{self._name}.{kind}" for kind in ("bin", "idx", "mask")}
        builder = indexed_dataset.IndexedDatasetBuilder(str(paths["bin"]), dtype)
        ids = numpy.memmap(self._came["ids"], numpy.int32, "r")
        learnt = numpy.memmap(self._came["learnt"], numpy.uint8, "r")
        ends = numpy.cumsum(self._lengths, dtype=numpy.int64)
        counted = 0
        with paths["mask"].open("wb") as mask:
            for window in windows:
                places = [slice(ends[number] - self._lengths[number], ends[number]) for number in window]
                builder.add_document(
                    numpy.concatenate([ids[place] for place in places]), [self._lengths[number] for number in window]
                )
                for place in places:
                    mask.write(learnt[place].tobytes())
                    counted += int(learnt[place].sum(dtype=numpy.int64))
        builder.finalize(str(paths["idx"]))
        sums = {f"{kind}_sha256": sha256_checksum(path) for kind, path in paths.items()}
        return {"counted_tokens": counted, "largest_id": int(ids.max()), "dtype": dtype.__name__, **sums}
