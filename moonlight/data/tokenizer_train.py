"""Train SentencePiece BPE, and write the Hugging Face fast tokenizer with the same ids.

A trained folder contains `tokenizer.model` (SentencePiece, used by `moonlight data prepare`), `tokenizer.json` with its
two config files and `chat_template.jinja` (used by transformers and servers), and `manifest.json`.

U+2581 in text gets the ids of a space, because SentencePiece represents spaces by it. It is the only character that
does not survive a round trip.
"""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from moonlight.data.chat_template import CHAT_TEMPLATE, CONTROL_PIECES, TEMPLATE_FILE
from moonlight.data.documents import fingerprint, iter_files, read_records
from moonlight.data.manifest import MANIFEST_FILE, check_same
from moonlight.data.tokenizer_config import CONFIG_FILE
from moonlight.errors import UserError
from moonlight.files import atomic_folder, atomic_write_text, sha256_checksum, write_json

_VERSION = 1
_SPACE = "\u2581"
_MAX_PIECE_LENGTH = 32
_MAX_TRAINING_BYTES = 100_000_000
_SLICE_CHARACTERS = 100_000
# A word includes the whitespace before it: "\n        return" can be one piece. No piece spans two words.
_WORD = re.compile(r"\s*\S{1,64}|\s+")
# SentencePiece's trainer ends a sentence at a tab, so tabs are trained as a noncharacter and then renamed.
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
    """Train a tokenizer on `inputs` and write its folder `out`; if `out` already has it, print so and return.

    The files are byte-identical for the same inputs and settings and any number of threads. If the inputs are larger
    than `max_training_bytes`, about that much is used: slices of documents, chosen by the hash of their text.

    Args:
        inputs: files and folders of text, JSONL or Parquet.
        vocab_size: number of ids, control and byte pieces included.
        out: folder to write.
        text_field: JSONL key or Parquet column that holds the text.
        threads: threads of SentencePiece's trainer.
        max_training_bytes: bytes of text to train on, about.

    Raises:
        UserError: inputs are missing or have no text, vocab_size is too large or too small for them, or `out` exists
            with different content.
    """
    if not 0 < vocab_size < 2**31:
        raise UserError(f"vocab_size is {vocab_size}: it must be from 1 to {2**31 - 1}, for example 32000")
    files = iter_files(inputs)
    settings = {"vocab_size": vocab_size, "text_field": text_field, "max_training_bytes": max_training_bytes}
    expected = {"version": _VERSION, "settings": settings, "inputs_sha256": fingerprint(files)}
    if out.exists():
        check_same(out, expected)
        print(f"{out}: this tokenizer has been trained already")
        return
    size = sum(file.stat().st_size for file in files)
    words, bad = _count_words(files, text_field, min(1.0, max_training_bytes / max(size, 1)))
    if not words:
        names = ", ".join(map(str, inputs)) or "(none)"
        raise UserError(
            f"inputs {names}: no text to train a tokenizer on ({bad} records are unusable); give UTF-8 text, or "
            f"JSONL or Parquet with the field {text_field!r}"
        )
    model = _train_model(words, vocab_size, threads)
    with atomic_folder(out) as part:
        (part / "tokenizer.model").write_bytes(model)
        _write_hugging_face(part, sentencepiece.SentencePieceProcessor(model_proto=model))
        checksums = {f"{name}_sha256": sha256_checksum(part / name) for name in ("tokenizer.model", "tokenizer.json")}
        write_json(part / MANIFEST_FILE, {**expected, "files": len(files), "bad_records": bad, **checksums})


def _count_words(files: Sequence[Path], text_field: str, fraction: float) -> tuple[Counter[str], int]:
    """Return the count of each word in about `fraction` of the text, and the number of bad records."""
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
                if int.from_bytes(digest, "big") < fraction * 2**64:
                    words.update(_WORD.findall(text))
    return words, bad


def _train_model(words: Counter[str], vocab_size: int, threads: int) -> bytes:
    """Return a serialized SentencePiece model; its bytes depend on `words` and `vocab_size` alone."""
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
            # _WORD has already split the text; within a word, any pieces may merge.
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
        if match := re.search(r"Vocabulary size too high .* <= (\d+)", str(error)):
            raise UserError(f"vocab_size is {vocab_size}: these inputs support at most {match[1]} ids") from None
        if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise UserError(f"vocab_size is {vocab_size}: these inputs need at least {match[1]} ids") from None
        raise
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(stream.getvalue())
    model.trainer_spec.ClearField("num_threads")
    for piece in model.pieces:
        piece.piece = piece.piece.replace(_TAB_STAND_IN, "\t")
    return model.SerializeToString(deterministic=True)


def _sentences(words: Counter[str]) -> Iterator[str]:
    """Yield words with their counts as tab-separated lines, from the most frequent; ties are in alphabetical order."""
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
    # Ids of normal pieces increase as scores decrease, so this is SentencePiece's order of merges.
    merges = [
        (piece[:split], piece[split:])
        for piece in sorted(normal, key=vocab.__getitem__)
        for split in range(1, len(piece))
        if piece[:split] in normal and piece[split:] in normal
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
    special_map = {**special, "additional_special_tokens": list(CONTROL_PIECES)}
    write_json(folder / "special_tokens_map.json", special_map)
    write_json(
        folder / CONFIG_FILE,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special_map,
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
        },
    )
    atomic_write_text(folder / TEMPLATE_FILE, CHAT_TEMPLATE)
