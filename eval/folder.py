"""Loading of a Hugging Face folder with transformers. No code of the folder runs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moonlight.errors import UserError

CONFIG_FILE = "config.json"


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a folder; raise UserError if it is missing or corrupt."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not a Hugging Face folder: it has no {CONFIG_FILE}; export a model to it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} is corrupt: it is not a JSON object")
    return config


def context_length(folder: Path) -> int | None:
    """Return max_position_embeddings of config.json, in tokens; None if absent."""
    value = read_hf_config(folder).get("max_position_embeddings")
    return value if type(value) is int else None


def load_tokenizer(folder: Path, **settings: Any) -> Any:
    """Load the tokenizer of a folder with `settings` of transformers; raise UserError if that fails."""
    return _load("AutoTokenizer", folder, **settings)


def load_chat_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a chat model, which encodes markers as control ids.

    Raises:
        UserError: the folder cannot be loaded, or has no chat template.
    """
    tokenizer = load_tokenizer(folder, split_special_tokens=False)
    if not tokenizer.chat_template:
        raise UserError(f"{folder} has no chat template: export a model tuned on conversations with --chat")
    return tokenizer


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the ids of a conversation, followed by the header of the next answer.

    Args:
        tokenizer: tokenizer of `load_chat_tokenizer`.
        messages: messages with `role` and `content`. Text in them that spells out a special token stays text.
    """
    ids: list[int] = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False
    )
    return ids


def load_model(folder: Path, dtype: str = "float32") -> Any:
    """Load the causal language model of a folder on the CPU, in eval mode; raise UserError if that fails."""
    import torch

    return _load("AutoModelForCausalLM", folder, dtype=getattr(torch, dtype)).eval()


def _load(auto_class: str, folder: Path, **settings: Any) -> Any:
    read_hf_config(folder)
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=False, **settings)
    except Exception as error:  # transformers raises many exception types for an unreadable folder
        raise load_error(folder, error) from error


def load_error(folder: Path, error: Exception, library: str = "transformers") -> UserError:
    """Return the error for a folder that a library cannot load."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return UserError(f"{folder} cannot be loaded with {library}: {reason}")
