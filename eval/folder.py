"""Loading a Hugging Face folder by plain transformers. No code of the folder runs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moonlight.errors import UserError


def read_hf_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder; raise UserError if there is none, or it is damaged."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no Hugging Face folder: it has no config.json; make one with `moonlight export`")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged: it is not a JSON object")
    return config


def context_length(folder: Path) -> int | None:
    """Tokens of context that config.json states; None if it states none."""
    value = read_hf_config(folder).get("max_position_embeddings")
    return value if type(value) is int else None


def load_tokenizer(folder: Path, **settings: Any) -> Any:
    """The tokenizer of a folder, with transformers' `settings`; raise UserError if there is none that can be used."""
    return _load("AutoTokenizer", folder, **settings)


def load_chat_tokenizer(folder: Path) -> Any:
    """The tokenizer of a chat model, whose markers become control ids; raise UserError if it has no chat template."""
    tokenizer = load_tokenizer(folder, split_special_tokens=False)
    if not tokenizer.chat_template:
        raise UserError(f"{folder} has no chat template: export a model tuned on conversations with --chat")
    return tokenizer


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a conversation so far and of the beginning of an answer.

    Args:
        tokenizer: of `load_chat_tokenizer`.
        messages: with `role` and `content`. What spells a special token in them stays text.
    """
    ids: list[int] = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False
    )
    return ids


def load_model(folder: Path, dtype: str = "float32") -> Any:
    """The causal language model of a folder, for inference, on the CPU; raise UserError if it cannot be used."""
    import torch

    return _load("AutoModelForCausalLM", folder, dtype=getattr(torch, dtype)).eval()


def _load(kind: str, folder: Path, **settings: Any) -> Any:
    read_hf_config(folder)
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return getattr(transformers, kind).from_pretrained(folder, trust_remote_code=False, **settings)
    except Exception as error:  # transformers raises many kinds for a folder that it cannot read
        raise unusable(folder, error) from error


def unusable(folder: Path, error: Exception, by: str = "transformers") -> UserError:
    """What is said of a folder that a library could not load."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return UserError(f"{folder} is no usable Hugging Face folder, {by} says: {reason}")
