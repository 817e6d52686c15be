"""What the JSON files of a tokenizer folder say: which tokens are special, and which of them ends a text."""

import json
from pathlib import Path
from typing import Any

from moonlight.errors import UserError


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file, {} if there is no such file; raise UserError if it holds anything else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"tokenizer file {path} is damaged: a JSON object is expected")
    return content


def token_text(entry: Any) -> str | None:
    """The text of a token that a config names, as a string or as an object with its `content`."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def special_tokens(config: dict[str, Any]) -> set[str]:
    """Texts of all tokens that a tokenizer_config.json declares special."""
    entries = [value for key, value in config.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(key)
        entries += listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else []
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        entries += [entry for entry in decoder.values() if isinstance(entry, dict) and entry.get("special")]
    return {text for entry in entries if (text := token_text(entry))}


def end_of_text_id(folder: Path, config: dict[str, Any], vocab: dict[str, int]) -> int:
    """The id put after every document, one of `vocab`, which has all tokens of the folder and their ids.

    It is the `eos_token` of tokenizer_config.json; without one, the (first) `eos_token_id` of generation_config.json or
    config.json in the same folder.

    Raises:
        UserError: none of them names one, or it is no token of this tokenizer.
    """
    name = token_text(config.get("eos_token"))
    if name is not None:
        if name not in vocab:
            raise UserError(f"tokenizer {folder} has eos_token {name!r}: one of its own tokens is needed")
        return vocab[name]
    for file in ("generation_config.json", "config.json"):
        value = read_object(folder / file).get("eos_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if value is None:
            continue
        if type(value) is not int or value not in vocab.values():
            raise UserError(f"{folder / file} has eos_token_id {value!r}: an id of the tokenizer beside it is needed")
        return value
    raise UserError(
        f"tokenizer {folder} has no end-of-document id: an eos_token in its tokenizer_config.json is needed, or an "
        "eos_token_id in a generation_config.json or config.json beside it"
    )
