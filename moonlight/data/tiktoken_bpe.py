"""Moonlight's own kind of tokenizer, `tiktoken.model`, as a Hugging Face fast tokenizer; no remote code.

A `tiktoken.model` has one line a token: its bytes in base64 and its rank, which is its id. Text is cut by a pattern
first; within a piece, the two neighbours that join to the token of lowest rank are joined, again and again. The ids
equal those of the `tiktoken` package with the same pattern.

The code published with the models also cuts text every 400,000 characters, and runs without (or of) whitespace every
25,000 characters, before it encodes. No tokenizer.json can say that: text with such runs, or a word across such a cut,
gets other ids here.
"""

import base64
import shutil
from pathlib import Path
from typing import Any

import tokenizers

from moonlight.data.chat_template import CHAT_TEMPLATE, CONTROL_PIECES
from moonlight.data.tokenizer_config import read_object, special_tokens, token_text
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
"""How the Moonlight and Kimi tokenizers cut text into pieces: `pat_str` of their published tokenizer code."""

_MAX_SPECIAL_IDS = 65_536


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a `tiktoken.model` and their ranks, which are 0 to their number less one.

    Raises:
        UserError: a line that is not base64 and a rank, a rank or token that is missing or there twice.
    """
    ranks: dict[bytes, int] = {}
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            token, digits = line.split()
            raw, rank = base64.b64decode(token, validate=True), int(digits)
        except ValueError:
            raw, rank = b"", -1
        if not raw or rank < 0:
            raise _damaged(path, f"line {number} is not a token in base64 and its rank")
        if raw in ranks:
            raise _damaged(path, f"line {number} has the token {raw!r} again")
        ranks[raw] = rank
    given = sorted(ranks.values())
    wrong = next((rank for rank, there in enumerate(given) if rank != there), None)
    if wrong is not None:
        twice = given[wrong] < wrong
        raise _damaged(path, f"rank {given[wrong]} is there twice" if twice else f"rank {wrong} is missing")
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking:
        raise _damaged(path, f"it has no token for the byte 0x{lacking[0]:02x}; every byte needs one")
    return ranks


def special_names(folder: Path, config: dict[str, Any], first: int) -> list[str]:
    """Texts of the special ids, from the id `first` on.

    They end with the largest id that `added_tokens_decoder` of tokenizer_config.json names; ids before it without a
    name are reserved. For Moonlight that makes 163,840 ids, as many as its embedding has rows. The code published with
    it adds two more reserved ids, which have no rows and which nothing uses.

    Raises:
        UserError: the config names no special token, or names one wrongly.
    """
    path = folder / "tokenizer_config.json"
    decoder = config.get("added_tokens_decoder")
    if not isinstance(decoder, dict) or not decoder:
        raise UserError(f"{path} names no special tokens: {TIKTOKEN_FILE} needs an added_tokens_decoder there")
    named: dict[int, str] = {}
    for key, entry in decoder.items():
        text = token_text(entry)
        usual = key.isdecimal() and len(key) < 10 and 0 <= int(key) - first < _MAX_SPECIAL_IDS
        if not text or not usual:
            raise UserError(
                f"{path} has {key!r} in added_tokens_decoder: an id of {first} or a little more, and its content, "
                "are expected"
            )
        named[int(key)] = text
    names = [named.get(index, _reserved(index)) for index in range(first, max(named) + 1)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} gives two ids to {twice!r}: each special token has one")
    return names


def fast_tokenizer(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """The fast tokenizer that gives the ids of the folder's `tiktoken.model`; no post-processor.

    `config` is the folder's tokenizer_config.json. All special ids are special tokens of the result, also those that
    the config marks as not special: only so can text never spell one.

    Raises:
        UserError: a damaged `tiktoken.model`, or special tokens that cannot be used.
    """
    ranks = read_ranks(folder / TIKTOKEN_FILE)
    names = special_names(folder, config, len(ranks))
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    taken = vocab.keys() & set(names)
    if taken:
        raise UserError(f"{folder / TIKTOKEN_FILE} has {min(taken)!r} as text: it cannot be a special token as well")
    merges = [
        (spelled[pair[0]], spelled[pair[1]])
        for token in sorted(ranks, key=ranks.__getitem__)
        if len(token) > 1 and (pair := _last_pair(token, ranks))
    ]
    # tiktoken looks a whole piece up before it joins bytes; ignore_merges is the same.
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=True))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    letter = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, letter])
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
    assert fast.get_vocab_size() == len(ranks) + len(names)
    return fast


def convert_tiktoken(source: Path, out: Path) -> None:
    """Write what plain transformers and the servers need of the tiktoken folder `source` into the folder `out`.

    These are tokenizer.json, tokenizer_config.json without `auto_map`, special_tokens_map.json and the chat template:
    the source's own if it has one, else Moonlight's if the source has its markers. `split_special_tokens` is true
    unless the source says otherwise; see `chat_template`.

    Raises:
        UserError: a damaged `tiktoken.model`, or special tokens that cannot be used.
    """
    config = read_object(source / "tokenizer_config.json")
    fast = fast_tokenizer(source, config)
    specials = {index: token.content for index, token in sorted(fast.get_added_tokens_decoder().items())}
    roles = {
        key: text
        for key, value in config.items()
        if key.endswith("_token") and (text := token_text(value)) in specials.values()
    }
    named = special_tokens(config) - set(roles.values())
    others = [text for index, text in specials.items() if text in named and text != _reserved(index)]
    special_map = {**roles, "additional_special_tokens": others}
    kept = {key: config[key] for key in ("model_max_length", "padding_side", "chat_template") if key in config}
    make_folder(out)
    atomic_write_text(out / "tokenizer.json", fast.to_str(pretty=True) + "\n")
    write_json(out / "special_tokens_map.json", special_map)
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special_map,
            **kept,
            "split_special_tokens": config.get("split_special_tokens", True),
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {
                str(index): {
                    "content": text,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for index, text in specials.items()
            },
        },
    )
    template = source / "chat_template.jinja"
    if template.is_file():
        shutil.copyfile(template, out / template.name)
    elif "chat_template" not in config and set(CONTROL_PIECES) <= set(specials.values()):
        atomic_write_text(out / template.name, CHAT_TEMPLATE)


def _last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts that tiktoken's joining ends with when it makes `token`; None if joining never makes it.

    Neighbours outside a token never change how its inside is joined, so this pair is the only way to it.
    """
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        lowest, place = len(ranks), -1
        for at in range(len(parts) - 1):
            rank = ranks.get(parts[at] + parts[at + 1], lowest)
            if rank < lowest:
                lowest, place = rank, at
        if place < 0:
            return None
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]


def _byte_letters() -> list[str]:
    """The visible letter that byte-level BPE writes for each byte (the table of GPT-2)."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 256 + hidden.index(byte)) for byte in range(256)]


def _reserved(index: int) -> str:
    """The text of a special id without a name, as the published tokenizer code has it."""
    return f"<|reserved_token_{index}|>"


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"tokenizer {path} is damaged: {reason}")
