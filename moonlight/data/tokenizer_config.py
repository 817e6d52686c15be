"""Read the JSON files of a tokenizer folder: the special tokens, and the end-of-text token."""

import json
from pathlib import Path
from typing import Any

from moonlight.errors import UserError

CONFIG_FILE = "tokenizer_config.json"


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file, {} if it does not exist; raise UserError if it is anything else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"tokenizer file {path} is corrupt: a JSON object is expected")
    return content


def token_text(entry: Any) -> str | None:
    """Return the text of a token in a config: a string, or an object with its `content`. None for anything else."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def special_tokens(config: dict[str, Any]) -> set[str]:
    """Return the texts of all tokens that a tokenizer_config.json declares special."""
    entries = [value for key, value in config.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key)
        entries += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        entries += [entry for entry in decoder.values() if isinstance(entry, dict) and entry.get("special")]
    return {text for entry in entries if (text := token_text(entry))}


def end_of_text_id(folder: Path, config: dict[str, Any], vocab: dict[str, int]) -> int:
    """Return the id that ends every document.

    It is the `eos_token` of tokenizer_config.json; without one, the (first) `eos_token_id` of generation_config.json or
    config.json in the same folder.

    Args:
        vocab: all tokens of the folder and their ids.

    Raises:
        UserError: no file names an end-of-text token, or it is not in `vocab`.
    """
    name = token_text(config.get("eos_token"))
    if name is not None:
        if name not in vocab:
            raise UserError(f"tokenizer {folder} has eos_token {name!r}: it must be one of the tokenizer's tokens")
        return vocab[name]
    for file in ("generation_config.json", "config.json"):
        value = read_object(folder / file).get("eos_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if value is None:
            continue
        if type(value) is not int or value not in vocab.values():
            raise UserError(f"{folder / file} has eos_token_id {value!r}: it must be an id of the tokenizer")
        return value
    raise UserError(
        f"tokenizer {folder} has no end-of-document id: set eos_token in its tokenizer_config.json, or eos_token_id in "
        "its generation_config.json or config.json"
    )
