"""Answers of an exported chat model, greedily by plain transformers, beside the ones wanted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.folder import chat_ids, load_chat_tokenizer, load_model
from moonlight.progress import track_progress


@dataclass(frozen=True)
class Answer:
    """What a model said where the last message of a conversation was wanted."""

    wanted: str
    text: str
    ended: bool
    """By itself, with an end token; otherwise it was cut off."""

    @property
    def is_exact(self) -> bool:
        """The very text, and nothing after it."""
        return self.ended and self.text == self.wanted


def generate_answers(
    folder: Path, conversations: Sequence[Sequence[Mapping[str, str]]], *, max_new_tokens: int = 32, batch: int = 64
) -> list[Answer]:
    """Ask an exported model what the last message of each conversation is, given those before it.

    Args:
        folder: made by `moonlight export --chat`.
        conversations: messages with `role` and `content`; the last of each is an assistant's.
        max_new_tokens: longest answer.
        batch: conversations at once, the longest together; shorter prompts are padded on the left.

    Raises:
        UserError: `folder` is no Hugging Face folder that can be used.
    """
    import torch

    tokenizer, model = load_chat_tokenizer(folder), load_model(folder)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    prompts = [chat_ids(tokenizer, messages[:-1]) for messages in conversations]
    by_length = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    found: dict[int, Answer] = {}
    starts = range(0, len(by_length), batch)
    for start in track_progress(starts, f"{folder}: answers"):
        numbers = by_length[start : start + batch]
        longest = len(prompts[numbers[0]])
        ids = torch.tensor([[pad] * (longest - len(prompts[number])) + prompts[number] for number in numbers])
        mask = torch.tensor([[0] * (longest - len(prompts[number])) + [1] * len(prompts[number]) for number in numbers])
        with torch.no_grad():
            output = model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_length=None,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
            )
        for number, row in zip(numbers, output[:, longest:].tolist(), strict=True):
            stop = next((place for place, token in enumerate(row) if token in ends), None)
            text = tokenizer.decode(row[:stop], skip_special_tokens=True)
            found[number] = Answer(conversations[number][-1]["content"], text, stop is not None)
    return [found[number] for number in range(len(prompts))]


def exact_match_by_task(answers: Sequence[Answer], tasks: Sequence[str]) -> dict[str, Any]:
    """Share of exact answers by task, and `all`; with how many there are of each."""
    shares: dict[str, Any] = {}
    for task in (*sorted(set(tasks)), "all"):
        own = [answer.is_exact for answer, its in zip(answers, tasks, strict=True) if task in (its, "all")]
        shares[task] = {"exact": sum(own) / len(own), "conversations": len(own)}
    return shares
