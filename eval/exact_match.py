"""Exact match of an exported chat model: greedy answers by transformers, compared with the expected ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.folder import chat_ids, load_chat_tokenizer, load_model
from moonlight.progress import track_progress


@dataclass(frozen=True)
class Answer:
    """Answer of a model, and the expected last message of the conversation."""

    wanted: str
    text: str
    ended: bool
    """True if the answer ended with an end token, False if it reached the maximum length."""

    @property
    def is_exact(self) -> bool:
        """True if the answer ended and is identical to the expected text."""
        return self.ended and self.text == self.wanted


def generate_answers(
    folder: Path,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 64,
) -> list[Answer]:
    """Generate the last message of each conversation from the messages before it.

    Args:
        folder: folder of `moonlight export --chat`.
        conversations: messages with `role` and `content`; the last message is the assistant's.
        max_new_tokens: maximum length of an answer, in tokens.
        batch_size: conversations per batch, sorted by length; shorter prompts are padded on the left.

    Raises:
        UserError: transformers cannot load `folder`, or it has no chat template.
    """
    import torch

    tokenizer, model = load_chat_tokenizer(folder), load_model(folder)
    eos_ids = model.generation_config.eos_token_id
    eos_ids = set(eos_ids if isinstance(eos_ids, list) else [eos_ids])
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    prompts = [chat_ids(tokenizer, messages[:-1]) for messages in conversations]
    by_length = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers: dict[int, Answer] = {}
    starts = range(0, len(by_length), batch_size)
    for start in track_progress(starts, f"{folder}: answers"):
        indices = by_length[start : start + batch_size]
        longest = len(prompts[indices[0]])
        ids = torch.tensor([[pad_id] * (longest - len(prompts[index])) + prompts[index] for index in indices])
        mask = torch.tensor([[0] * (longest - len(prompts[index])) + [1] * len(prompts[index]) for index in indices])
        with torch.no_grad():
            output = model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_length=None,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad_id,
            )
        for index, row in zip(indices, output[:, longest:].tolist(), strict=True):
            stop = next((position for position, token in enumerate(row) if token in eos_ids), None)
            text = tokenizer.decode(row[:stop], skip_special_tokens=True)
            answers[index] = Answer(conversations[index][-1]["content"], text, stop is not None)
    return [answers[index] for index in range(len(prompts))]


def exact_match_by_task(answers: Sequence[Answer], tasks: Sequence[str]) -> dict[str, Any]:
    """Return the fraction of exact answers and the number of conversations, by task and for `all`."""
    results: dict[str, Any] = {}
    for task in (*sorted(set(tasks)), "all"):
        exact = [answer.is_exact for answer, name in zip(answers, tasks, strict=True) if task in (name, "all")]
        results[task] = {"exact": sum(exact) / len(exact), "conversations": len(exact)}
    return results
