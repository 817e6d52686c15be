"""Training SentencePiece BPE, and the Hugging Face fast tokenizer that gives the same ids.

A trained folder holds `tokenizer.model` (SentencePiece; what preparing uses), `tokenizer.json` with its two config
files and `chat_template.jinja` (what transformers and the servers use), and `manifest.json`.

U+2581 in text gets the ids of a space, because SentencePiece writes spaces so: it is the only character that does not
survive a round trip.
"""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from moonlight.data.chat_template import CHAT_TEMPLATE, CONTROL_PIECES
from moonlight.data.documents import fingerprint, iter_files, read_records
from moonlight.data.manifest import check_same
from moonlight.errors import UserError
from moonlight.files import atomic_folder, atomic_write_text, sha256_checksum, write_json

_VERSION = 1
_SPACE = "\u2581"
_MAX_PIECE_LENGTH = 32
_MAX_TRAINING_BYTES = 100_000_000
_SLICE_CHARACTERS = 100_000
# A word carries the whitespace before it: "\n        return" can be one piece; none spans two words.
_WORD = re.compile(r"\s*\S{1,64}|\s+")
# Tabs end a sentence inside SentencePiece's trainer: they are trained as a noncharacter, then renamed.
_TAB_STAND_IN = "\ufdd0"


def train_tokenizer(
    inputs: Sequence[Path],
    vocab_size: int,
    out: Path,
    *,
    text_field: str = "text",
    threads: int = 1,
    max_training_bytes: int = _MAX_TRAINING_BYTES,
) -> None:
    """Train a tokenizer on `inputs` and write its folder `out`; say so and return if it is there already.

    The same inputs and settings give the same bytes, whatever `threads` is. Of inputs larger than
    `max_training_bytes` a part of about that size is used: slices of documents chosen by the hash of their
    text.

    Args:
        vocab_size: number of ids, control and byte pieces included.
        text_field: JSONL key or Parquet column that holds the text.

    Raises:
        UserError: inputs missing or without text, vocab_size too large or too small for them, or `out` exists
            with something else in it.
    """
    if not 0 < vocab_size < 2**31:
        raise UserError(f"vocab_size is {vocab_size}: it must be from 1 to {2**31 - 1}, for example 32000")
    files = iter_files(inputs)
    settings = {"vocab_size": vocab_size, "text_field": text_field, "max_training_bytes": max_training_bytes}
    wanted = {"version": _VERSION, "settings": settings, "inputs_sha256": fingerprint(files)}
    if out.exists():
        check_same(out, wanted)
        print(f"{out}: this tokenizer has been trained already")
        return
    size = sum(file.stat().st_size for file in files)
    words, bad = _count_words(files, text_field, min(1.0, max_training_bytes / max(size, 1)))
    if not words:
        names = ", ".join(map(str, inputs)) or "(none)"
        raise UserError(
            f"inputs {names}: no text to train a tokenizer on ({bad} records cannot be used); give UTF-8 text, or "
            f"JSONL or Parquet with the field {text_field!r}"
        )
    model = _train_model(words, vocab_size, threads)
    with atomic_folder(out) as part:
        (part / "tokenizer.model").write_bytes(model)
        _write_hugging_face(part, sentencepiece.SentencePieceProcessor(model_proto=model))
        checksums = {f"{name}_sha256": sha256_checksum(part / name) for name in ("tokenizer.model", "tokenizer.json")}
        write_json(part / "manifest.json", {**wanted, "files": len(files), "bad_records": bad, **checksums})


def _count_words(files: Sequence[Path], text_field: str, share: float) -> tuple[Counter[str], int]:
    """How often each word occurs in about `share` of the text, and the number of bad records."""
    words: Counter[str] = Counter()
    bad = 0
    for file in files:
        for record in read_records(file, text_field):
            if record.text is None:
                bad += 1
                continue
            for start in range(0, len(record.text), _SLICE_CHARACTERS):
                text = record.text[start : start + _SLICE_CHARACTERS]
                digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
                if int.from_bytes(digest, "big") < share * 2**64:
                    words.update(_WORD.findall(text))
    return words, bad


def _train_model(words: Counter[str], vocab_size: int, threads: int) -> bytes:
    """A serialised SentencePiece model; its bytes depend on `words` and `vocab_size` alone."""
    from sentencepiece import sentencepiece_model_pb2

    stream = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(words),
            model_writer=stream,
            input_format="tsv",
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            # _WORD has cut the text already; within a word anything may merge.
            split_by_whitespace=False,
            split_by_unicode_script=False,
            split_by_number=False,
            max_sentencepiece_length=_MAX_PIECE_LENGTH,
            character_coverage=0.9999,
            bos_piece="[BOS]",
            eos_piece="[EOS]",
            pad_piece="[PAD]",
            pad_id=3,
            control_symbols=list(CONTROL_PIECES),
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        if found := re.search(r"Vocabulary size too high .* <= (\d+)", str(error)):
            raise UserError(f"vocab_size is {vocab_size}: these inputs can teach at most {found[1]} ids") from None
        if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise UserError(f"vocab_size is {vocab_size}: these inputs need at least {found[1]} ids") from None
        raise
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(stream.getvalue())
    model.trainer_spec.ClearField("num_threads")
    for piece in model.pieces:
        piece.piece = piece.piece.replace(_TAB_STAND_IN, "\t")
    return model.SerializeToString(deterministic=True)


def _sentences(words: Counter[str]) -> Iterator[str]:
    """Words with their counts in SentencePiece's tab-separated form, in an order that they alone decide."""
    for word, count in sorted(words.items(), key=lambda item: (-item[1], item[0])):
        if "\0" not in word and _TAB_STAND_IN not in word:
            yield f"{word.replace(chr(9), _TAB_STAND_IN)}\t{count}"


def _write_hugging_face(folder: Path, model: sentencepiece.SentencePieceProcessor) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja."""
    import tokenizers

    vocab = {model.id_to_piece(index): index for index in range(model.get_piece_size())}
    assert len(vocab) == model.get_piece_size()
    reserved = [piece for piece, index in vocab.items() if model.is_control(index) or model.is_unknown(index)]
    normal = {piece for piece, index in vocab.items() if not (piece in reserved or model.is_byte(index))}
    # Ids of normal pieces rise as scores fall, so this is the order in which SentencePiece prefers to merge.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(normal, key=vocab.__getitem__)
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    unknown = model.id_to_piece(model.unk_id())
    fast = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    fast.normalizer = tokenizers.normalizers.Replace(" ", _SPACE)
    decoders = tokenizers.decoders
    fast.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens([tokenizers.AddedToken(piece, special=True, normalized=False) for piece in reserved])
    atomic_write_text(folder / "tokenizer.json", fast.to_str(pretty=True) + "\n")
    special = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": unknown}
    write_json(folder / "special_tokens_map.json", {**special, "additional_special_tokens": list(CONTROL_PIECES)})
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "additional_special_tokens": list(CONTROL_PIECES),
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
        },
    )
    atomic_write_text(folder / "chat_template.jinja", CHAT_TEMPLATE)
