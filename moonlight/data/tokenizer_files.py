"""Files of tokenizer folders: list them, and copy them so that plain transformers loads the copy."""

import shutil
from pathlib import Path

from moonlight.data.chat_template import TEMPLATE_FILE
from moonlight.data.tiktoken_bpe import TIKTOKEN_FILE, convert_tiktoken
from moonlight.data.tokenizer import Tokenizer
from moonlight.data.tokenizer_config import CONFIG_FILE, read_object, token_text
from moonlight.errors import UserError
from moonlight.files import make_folder, write_json

_NAMES = (
    "tokenizer.model",
    TIKTOKEN_FILE,
    "tokenizer.json",
    CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE_FILE,
)
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of transformers that use tokenizer.json unchanged; others may change how it splits text."""


def tokenizer_files(folder: Path) -> list[str]:
    """Return the names of the files of `folder` that belong to its tokenizer, without code."""
    return [name for name in _NAMES if (folder / name).is_file()]


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy a tokenizer folder of any kind into the folder `out`, so that transformers loads it without remote code.

    Files are copied unchanged, except tokenizer_config.json if it names code (`auto_map`), a class that changes
    tokenizer.json, tokens in a form that transformers does not read, or no `eos_token`. A tiktoken folder becomes the
    converted files and its tiktoken.model. `Tokenizer.load(out)` has the same ids and checksum as
    `Tokenizer.load(source)`.

    Raises:
        UserError: `source` is not a tokenizer folder that can be loaded, or lacks a tokenizer.json that is needed.
    """
    tokenizer = Tokenizer.load(source)
    make_folder(out)
    if tokenizer.file == TIKTOKEN_FILE:
        convert_tiktoken(source, out)
        shutil.copyfile(source / TIKTOKEN_FILE, out / TIKTOKEN_FILE)
        return
    names = tokenizer_files(source)
    if "tokenizer.json" not in names:
        raise UserError(f"tokenizer {source} has no tokenizer.json: transformers needs one next to {tokenizer.file}")
    for name in names:
        shutil.copyfile(source / name, out / name)
    config = read_object(source / CONFIG_FILE)
    plain = {key: value for key, value in config.items() if key != "auto_map"}
    for key, value in plain.items():
        if key.endswith("_token") and isinstance(value, dict) and "__type" not in value:
            plain[key] = token_text(value)  # transformers 5 rejects such objects
    if plain.get("tokenizer_class") not in _PLAIN_CLASSES:
        plain["tokenizer_class"] = _PLAIN_CLASSES[0]
    if token_text(plain.get("eos_token")) is None:
        plain["eos_token"] = tokenizer.eos_token
    if plain != config:
        write_json(out / CONFIG_FILE, plain)
