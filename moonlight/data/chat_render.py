"""Conversations as token ids, with a loss mask over the assistant's tokens.

A Jinja template renders a conversation. The rendered text is split at the template's special tokens and at the start of
each assistant turn, and each piece is encoded separately. Special tokens of the template become their ids. All other
text is encoded as text, so a message that spells a special token stays text. An inference prompt ends where the
assistant turn starts, so the ids before that point equal the ids of the prompt.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy

from moonlight.data.chat_template import CHAT_TEMPLATE, CONTROL_PIECES, TEMPLATE_FILE
from moonlight.data.conversations import Message, parse_messages
from moonlight.data.tokenizer import Tokenizer
from moonlight.data.tokenizer_config import CONFIG_FILE, read_object
from moonlight.errors import UserError

TEMPLATES = ("own", "moonlight")
_PRIVATE = range(0xE000, 0xF900)
"""Code points of Unicode's private use area."""
_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class RenderError(Exception):
    """The template cannot render a conversation; the message gives the reason."""


def find_template(folder: Path, choice: str) -> str:
    """Return the Jinja template to use with the tokenizer in `folder`.

    Args:
        choice: moonlight, or own: the template in `folder`, or Moonlight's if `folder` has none.

    Raises:
        UserError: `choice` is neither, or tokenizer_config.json is not a JSON object.
    """
    if choice not in TEMPLATES:
        raise UserError(f"template is {choice!r}: accepted are {', '.join(TEMPLATES)}")
    if choice == "own":
        if (folder / TEMPLATE_FILE).is_file():
            return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
        template = read_object(folder / CONFIG_FILE).get("chat_template")
        if isinstance(template, list):  # several named templates
            template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
        if isinstance(template, str):
            return template
    return CHAT_TEMPLATE


class ChatRenderer:
    """Renderer of conversations for one tokenizer and one template."""

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        """Prepare the template.

        Raises:
            UserError: the template cannot render, does not end assistant turns with a special token, or needs special
                tokens that the tokenizer lacks.
        """
        self._tokenizer, self._template = tokenizer, template
        self._ids = tokenizer.specials
        self._bos_token = next((text for text, index in self._ids.items() if index == tokenizer.bos_id), "")
        longest_first = "|".join(map(re.escape, sorted(self._ids, key=len, reverse=True)))
        self._special = re.compile(f"({longest_first})")
        self._special_start = re.compile(f"(?=(?:{longest_first}))")
        if short := [text for text in self._ids if len(text) < 2]:
            raise UserError(f"the tokenizer has the special token {short[0]!r}: it must have at least two characters")
        if template == CHAT_TEMPLATE and (missing := [name for name in CONTROL_PIECES if name not in self._ids]):
            raise UserError(
                f"the tokenizer has no {missing[0]}, which Moonlight's chat template needs: give a tokenizer that has "
                "a chat template"
            )
        self.end_token = self._find_end()

    def render(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation and its loss mask, both [tokens].

        The mask is True for the assistant's tokens, up to the token that ends its turn, and False for the first id.
        The template checks the roles.

        Raises:
            RenderError: the template rejects the conversation, or renders earlier turns differently if later turns
                follow.
        """
        text, spans, mark = self._spans(messages)
        edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
        assistant_starts = {start for start, _ in spans}
        ids: list[int] = []
        loss_mask: list[bool] = []
        for start, stop in pairwise(edges):
            for piece in self._special.split(text[start:stop]):
                if not piece:
                    continue
                special_id = self._ids.get(piece)
                piece_ids = [special_id] if special_id is not None else self._tokenizer.encode(piece.replace(mark, ""))
                ids += piece_ids
                loss_mask += [start in assistant_starts] * len(piece_ids)
        if loss_mask:
            loss_mask[0] = False
        return ids, loss_mask

    def _spans(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]], str]:
        """Return the rendered text, (start, stop) of each assistant turn in it, and the mark character.

        The mark breaks up special tokens that messages spell; it occurs in no message.
        """
        contents = "".join(message["content"] for message in messages)
        mark = next(character for character in map(chr, _PRIVATE) if character not in contents)
        marked = [{**message, "content": self._break_up(message["content"], mark)} for message in messages]
        text = self._render(marked)
        spans = []
        for index, message in enumerate(marked):
            if message["role"] != "assistant":
                continue
            before = self._render(marked[:index], add_generation_prompt=True)
            after = self._render(marked[: index + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise RenderError("template: it renders earlier turns differently if later turns follow")
            *_, end_token = [None, *self._special.finditer(after, len(before))]
            spans.append((len(before), end_token.end() if end_token else len(after)))
        return text, spans, mark

    def _break_up(self, text: str, mark: str) -> str:
        """Insert `mark` after the first character of every special token that `text` spells."""
        splits = [match.start() + 1 for match in self._special_start.finditer(text)]
        return mark.join(text[start:stop] for start, stop in pairwise([0, *splits, len(text)]))

    def _render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (text,), _ = render_jinja_template(
                conversations=[messages],
                chat_template=self._template,
                add_generation_prompt=add_generation_prompt,
                bos_token=self._bos_token,
                eos_token=self._tokenizer.eos_token,
            )
        except Exception as error:  # a user's template can raise any exception
            raise RenderError(f"template: {' '.join(str(error).split())[:200]}") from None
        return text

    def _find_end(self) -> str:
        """Return the special token that ends an assistant turn."""
        try:
            text, ((start, _),), _ = self._spans(_PROBE)
        except RenderError as error:
            raise UserError(f"the chat template cannot render ({error}): give another template") from None
        special_tokens = self._special.findall(text[start:])
        if not special_tokens:
            raise UserError(
                "the chat template has no special token at the end of an assistant turn, so answers would never end: "
                "give another template"
            )
        return special_tokens[-1]


class ChatEncoder:
    """Encoder of conversations for worker processes.

    Returns for each conversation int32 [2, tokens], its ids and loss mask, or the reason why it cannot be used.
    """

    def __init__(self, tokenizer_folder: Path, template: str, max_tokens: int) -> None:
        self._arguments, self._max_tokens = (tokenizer_folder, template, max_tokens), max_tokens
        self.tokenizer = Tokenizer.load(tokenizer_folder)
        self.renderer = ChatRenderer(self.tokenizer, template)

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatEncoder, self._arguments  # each worker loads the tokenizer

    def __call__(self, raw: list[bytes]) -> list[numpy.ndarray | str]:
        return [self._encode(text.decode()) for text in raw]

    def _encode(self, text: str) -> numpy.ndarray | str:
        try:
            rendered = numpy.array(self.renderer.render(parse_messages(text)), numpy.int32)
        except RenderError as error:
            return str(error)
        if (length := rendered.shape[1]) > self._max_tokens:
            return f"longer than the sequence: {length} tokens, {self._max_tokens} fit"
        return rendered
