"""Moonlight's published tokenizer format, `tiktoken.model`, as a Hugging Face fast tokenizer without remote code.

A `tiktoken.model` has one line per token: its bytes in base64 and its rank, which is its id. A pattern first splits the
text into pieces. Within a piece, the adjacent pair whose concatenation has the lowest rank is merged until no pair is a
token. The ids equal those of the `tiktoken` package with the same pattern.

The code published with the models also splits text every 400,000 characters, and runs without (or of) whitespace every
25,000 characters, before it encodes. A tokenizer.json cannot express that. Text with such runs, or a word across such a
split, gets other ids here.
"""

import base64
import shutil
from pathlib import Path
from typing import Any

import tokenizers

from moonlight.data.chat_template import CHAT_TEMPLATE, CONTROL_PIECES, TEMPLATE_FILE
from moonlight.data.tokenizer_config import CONFIG_FILE, read_object, special_tokens, token_text
from moonlight.errors import UserError
from moonlight.files import atomic_write_text, make_folder, write_json

TIKTOKEN_FILE = "tiktoken.model"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""Pattern that splits text into pieces: `pat_str` of the tokenizer code published with Moonlight and Kimi."""

_MAX_SPECIAL_IDS = 65_536


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return the tokens of a `tiktoken.model` and their ranks, from 0 to the number of tokens - 1.

    Raises:
        UserError: a line is not base64 and a rank, a rank or token occurs twice, or a rank or single byte is missing.
    """
    ranks: dict[bytes, int] = {}
    lines = path.read_bytes().splitlines()
    for line_number, line in enumerate(lines, start=1):
        try:
            token, digits = line.split()
            raw, rank = base64.b64decode(token, validate=True), int(digits)
        except ValueError:
            raw, rank = b"", -1
        if not raw or rank < 0:
            raise _corrupt_error(path, f"line {line_number} is not a token in base64 and its rank")
        if raw in ranks:
            raise _corrupt_error(path, f"line {line_number} repeats the token {raw!r}")
        ranks[raw] = rank
    sorted_ranks = sorted(ranks.values())
    wrong = next((expected for expected, rank in enumerate(sorted_ranks) if expected != rank), None)
    if wrong is not None:
        duplicate = sorted_ranks[wrong] < wrong
        reason = f"rank {sorted_ranks[wrong]} occurs twice" if duplicate else f"rank {wrong} is missing"
        raise _corrupt_error(path, reason)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise _corrupt_error(path, f"it has no token for the byte 0x{missing[0]:02x}; every byte needs one")
    return ranks


def special_names(folder: Path, config: dict[str, Any], first: int) -> list[str]:
    """Return the texts of the special ids, from the id `first` to the largest id in `added_tokens_decoder`.

    `config` is the folder's tokenizer_config.json. Ids without a name are reserved. Moonlight then has 163,840 ids, the
    number of rows of its embedding. The code published with it adds two more reserved ids, which have no rows and are
    never used.

    Raises:
        UserError: the config has no special token, an invalid one, or two with the same text.
    """
    path = folder / CONFIG_FILE
    decoder = config.get("added_tokens_decoder")
    if not isinstance(decoder, dict) or not decoder:
        raise UserError(f"{path} names no special tokens: {TIKTOKEN_FILE} needs added_tokens_decoder in it")
    named: dict[int, str] = {}
    for key, entry in decoder.items():
        text = token_text(entry)
        is_valid = key.isdecimal() and len(key) < 10 and 0 <= int(key) - first < _MAX_SPECIAL_IDS
        if not text or not is_valid:
            raise UserError(
                f"{path} has {key!r} in added_tokens_decoder: it must be an id from {first} to "
                f"{first + _MAX_SPECIAL_IDS - 1} with its content"
            )
        named[int(key)] = text
    names = [named.get(index, _reserved(index)) for index in range(first, max(named) + 1)]
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} gives two ids to {duplicate!r}: each special token must have one")
    return names


def fast_tokenizer(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """Return a fast tokenizer with the ids of the folder's `tiktoken.model`, without post-processor.

    `config` is the folder's tokenizer_config.json. All special ids are special tokens of the result, even if the config
    marks them as not special, so that text cannot spell one.

    Raises:
        UserError: `tiktoken.model` is corrupt, or the special tokens cannot be used.
    """
    ranks = read_ranks(folder / TIKTOKEN_FILE)
    names = special_names(folder, config, len(ranks))
    characters = _byte_characters()
    spelled = {token: "".join(characters[byte] for byte in token) for token in ranks}
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    conflicts = vocab.keys() & set(names)
    if conflicts:
        raise UserError(f"{folder / TIKTOKEN_FILE} has {min(conflicts)!r} as text: it cannot also be a special token")
    merges = [
        (spelled[pair[0]], spelled[pair[1]])
        for token in sorted(ranks, key=ranks.__getitem__)
        if len(token) > 1 and (pair := _last_pair(token, ranks))
    ]
    # tiktoken looks up the full piece before it merges bytes; ignore_merges does the same.
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=True))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
    assert fast.get_vocab_size() == len(ranks) + len(names)
    return fast


def convert_tiktoken(source: Path, out: Path) -> None:
    """Convert the tiktoken folder `source` to the files that plain transformers and servers load, in the folder `out`.

    The files are tokenizer.json, tokenizer_config.json without `auto_map`, special_tokens_map.json and the chat
    template. The template is the source's, or Moonlight's if the source has none but has Moonlight's markers.
    `split_special_tokens` is true unless the source sets it; see `chat_template`.

    Raises:
        UserError: `tiktoken.model` is corrupt, or the special tokens cannot be used.
    """
    config = read_object(source / CONFIG_FILE)
    fast = fast_tokenizer(source, config)
    specials = {index: token.content for index, token in sorted(fast.get_added_tokens_decoder().items())}
    roles = {
        key: text
        for key, value in config.items()
        if key.endswith("_token") and (text := token_text(value)) in specials.values()
    }
    declared = special_tokens(config) - set(roles.values())
    additional = [text for index, text in specials.items() if text in declared and text != _reserved(index)]
    special_map = {**roles, "additional_special_tokens": additional}
    kept = {key: config[key] for key in ("model_max_length", "padding_side", "chat_template") if key in config}
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    make_folder(out)
    atomic_write_text(out / "tokenizer.json", fast.to_str(pretty=True) + "\n")
    write_json(out / "special_tokens_map.json", special_map)
    write_json(
        out / CONFIG_FILE,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special_map,
            **kept,
            "split_special_tokens": config.get("split_special_tokens", True),
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {
                str(index): {"content": text, **flags, "special": True} for index, text in specials.items()
            },
        },
    )
    template = source / TEMPLATE_FILE
    if template.is_file():
        shutil.copyfile(template, out / template.name)
    elif "chat_template" not in config and set(CONTROL_PIECES) <= set(specials.values()):
        atomic_write_text(out / template.name, CHAT_TEMPLATE)


def _last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """Return the pair that tiktoken merges last to form `token`, or None if merging never forms it.

    Bytes outside a token do not affect the merges inside it, so this pair is the only one that forms the token.
    """
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        lowest, best = len(ranks), -1
        for index in range(len(parts) - 1):
            rank = ranks.get(parts[index] + parts[index + 1], lowest)
            if rank < lowest:
                lowest, best = rank, index
        if best < 0:
            return None
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def _byte_characters() -> list[str]:
    """Return the printable character that byte-level BPE uses for each byte (the table of GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


def _reserved(index: int) -> str:
    """Return the text of a special id without a name, as in the published tokenizer code."""
    return f"<|reserved_token_{index}|>"


def _corrupt_error(path: Path, reason: str) -> UserError:
    return UserError(f"tokenizer {path} is corrupt: {reason}")
