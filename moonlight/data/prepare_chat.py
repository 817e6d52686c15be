"""Prepare conversations: token ids on disk, packed into sequences, with a loss mask and a manifest.

The format is that of `prepare`, but a sequence of the index is a conversation and a document of the index is a window.
A window is a group of complete conversations with at most the sequence length of the run in tokens.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy

from moonlight.data.chat_render import ChatEncoder, find_template
from moonlight.data.chat_template import TEMPLATE_FILE
from moonlight.data.conversations import parse_messages, read_conversations
from moonlight.data.packing import pack
from moonlight.data.prepare import check_settings, import_indexed_dataset, list_input_files, write_data
from moonlight.errors import UserError
from moonlight.files import atomic_write_text, sha256_checksum


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
    encoder = ChatEncoder(tokenizer_folder, template_text, sequence_length)
    num_ids = encoder.tokenizer.num_ids
    files_by_input = list_input_files(inputs)
    for file in (file for files in files_by_input for file in files):
        if not file.name.endswith((".jsonl", ".jsonl.gz")):
            raise UserError(f"input {file} holds no conversations: a .jsonl or .jsonl.gz file is expected")

    def open_split(folder: Path, name: str) -> _ChatSplit:
        atomic_write_text(folder / TEMPLATE_FILE, template_text)
        return _ChatSplit(folder, name, num_ids, sequence_length if packing else 0)

    return write_data(
        inputs,
        files_by_input,
        encoder,
        out,
        settings={
            "messages_field": messages_field,
            "validation_share": validation_share,
            "max_bad_share": max_bad_share,
            "license": license,
        },
        workers=workers,
        read=partial(read_conversations, field=messages_field),
        open_split=open_split,
        present=f"{out}: these conversations have been prepared already",
        count_bytes=lambda raw: sum(len(message["content"].encode()) for message in parse_messages(raw.decode())),
        chat={
            "template_sha256": hashlib.sha256(template_text.encode()).hexdigest(),
            "end_token": encoder.renderer.end_token,
            "sequence_length": sequence_length,
            "packing": packing,
        },
    )


class _ChatSplit:
    """Writer of one split. Conversations go to temporary files first, because packing needs the lengths of all."""

    def __init__(self, folder: Path, name: str, num_ids: int, capacity: int) -> None:
        """`capacity` is the number of tokens of a window; 0 puts every conversation into a separate window."""
        self._folder, self._name, self._num_ids, self._capacity = folder, name, num_ids, capacity
        self._unpacked = {kind: folder / f".{name}.{kind}" for kind in ("ids", "mask")}
        self._files = {kind: path.open("wb") for kind, path in self._unpacked.items()}
        self._lengths: list[int] = []

    def add(self, _raw: bytes, encoded: numpy.ndarray) -> None:
        """Append one conversation: int32 [2, tokens], ids and loss mask."""
        self._files["ids"].write(encoded[0].tobytes())
        self._files["mask"].write(encoded[1].astype(numpy.uint8).tobytes())
        self._lengths.append(encoded.shape[1])

    def finish(self) -> dict[str, Any]:
        for file in self._files.values():
            file.close()
        one_each = [[index] for index in range(len(self._lengths))]
        windows = pack(self._lengths, self._capacity) if self._capacity else one_each
        indexed_dataset = import_indexed_dataset()
        dtype = indexed_dataset.DType.optimal_dtype(self._num_ids)
        paths = {kind: self._folder / f"{self._name}.{kind}" for kind in ("bin", "idx", "mask")}
        builder = indexed_dataset.IndexedDatasetBuilder(str(paths["bin"]), dtype)
        ids = numpy.memmap(self._unpacked["ids"], numpy.int32, "r")
        loss_mask = numpy.memmap(self._unpacked["mask"], numpy.uint8, "r")
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
        for path in self._unpacked.values():
            path.unlink()
        checksums = {f"{kind}_sha256": sha256_checksum(path) for kind, path in paths.items()}
        facts = {"counted_tokens": counted, "largest_id": int(ids.max()), "dtype": dtype.__name__}
        return {"windows": len(windows), **facts, **checksums}
