"""Conversations as token ids: which come from the template, which from the messages, and which of them are learnt.

A conversation is rendered by its Jinja template, and the result is cut at the template's special tokens and where the
assistant begins to speak. Each piece is encoded by itself: special tokens of the template as their ids, everything else
as letters, so that text that spells a special token stays text. What a model is asked with ends where the assistant
begins, so the ids before it are those that it will see.
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
from moonlight.data.tokenizer_config import read_object
from moonlight.errors import UserError

TEMPLATES = ("own", "moonlight")
_PRIVATE = range(0xE000, 0xF900)
"""Letters that Unicode gives no meaning."""
_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class RenderError(Exception):
    """A conversation that the template cannot render; the message says why."""


def find_template(folder: Path, choice: str) -> str:
    """The Jinja template to use with the tokenizer in `folder`.

    Args:
        choice: moonlight, or own: the one beside the tokenizer, and Moonlight's where there is none.

    Raises:
        UserError: another choice, or a template that is not text.
    """
    if choice not in TEMPLATES:
        raise UserError(f"template is {choice!r}: accepted are {', '.join(TEMPLATES)}")
    if choice == "own":
        if (folder / TEMPLATE_FILE).is_file():
            return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
        known = read_object(folder / "tokenizer_config.json").get("chat_template")
        if isinstance(known, list):  # several by name
            known = next((one.get("template") for one in known if one.get("name") == "default"), None)
        if isinstance(known, str):
            return known
    return CHAT_TEMPLATE


class ChatRenderer:
    """Renders conversations for one tokenizer with one template."""

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        """Raises UserError: the template does not work, or lets no special token end what the assistant says."""
        self._tokenizer, self._template = tokenizer, template
        self._ids = tokenizer.specials
        longest_first = "|".join(map(re.escape, sorted(self._ids, key=len, reverse=True)))
        self._special = re.compile(f"({longest_first})")
        self._begins = re.compile(f"(?=(?:{longest_first}))")
        if short := [text for text in self._ids if len(text) < 2]:
            raise UserError(f"the tokenizer has the special token {short[0]!r}: one of two letters or more is needed")
        if template == CHAT_TEMPLATE and (missing := [name for name in CONTROL_PIECES if name not in self._ids]):
            raise UserError(
                f"the tokenizer has no {missing[0]}, which Moonlight's chat template needs: give a tokenizer with "
                "a chat template of its own"
            )
        self.end_token = self._find_end()

    def render(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and which of them are learnt: the assistant's, up to the token that ends its turn.

        The first id never is. Roles are not checked: that is the template's.

        Raises:
            RenderError: the template refuses it, or changes what was said earlier when more is said.
        """
        text, spans, mark = self._spans(messages)
        edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
        learnt_from = {start for start, _ in spans}
        ids: list[int] = []
        learnt: list[bool] = []
        for start, end in pairwise(edges):
            for piece in self._special.split(text[start:end]):
                if not piece:
                    continue
                known = self._ids.get(piece)
                new = [known] if known is not None else self._tokenizer.encode(piece.replace(mark, ""))
                ids += new
                learnt += [start in learnt_from] * len(new)
        if learnt:
            learnt[0] = False
        return ids, learnt

    def _spans(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]], str]:
        """The rendered text, start and end in it of each assistant's turn, and the letter put into special tokens."""
        said = "".join(message["content"] for message in messages)
        mark = next(letter for letter in map(chr, _PRIVATE) if letter not in said)
        safe = [{**message, "content": self._break_up(message["content"], mark)} for message in messages]
        whole = self._render(safe)
        spans = []
        for index, message in enumerate(safe):
            if message["role"] != "assistant":
                continue
            before = self._render(safe[:index], ask=True)
            after = self._render(safe[: index + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise RenderError("template: it writes earlier turns otherwise when more is said")
            *_, last = [None, *self._special.finditer(after, len(before))]
            spans.append((len(before), last.end() if last else len(after)))
        return whole, spans, mark

    def _break_up(self, text: str, mark: str) -> str:
        """`text` with `mark` after the first letter of every special token that it spells."""
        places = [found.start() + 1 for found in self._begins.finditer(text)]
        return mark.join(text[start:end] for start, end in pairwise([0, *places, len(text)]))

    def _render(self, messages: list[Message], *, ask: bool = False) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (text,), _ = render_jinja_template(
                conversations=[messages],
                chat_template=self._template,
                add_generation_prompt=ask,
                bos_token=self._name(self._tokenizer.bos_id),
                eos_token=self._tokenizer.eos_token,
            )
        except Exception as error:  # whatever a template of somebody else's raises
            raise RenderError(f"template: {' '.join(str(error).split())[:200]}") from None
        return text

    def _name(self, index: int | None) -> str:
        return next((text for text, own in self._ids.items() if own == index), "")

    def _find_end(self) -> str:
        """The special token that ends what the assistant says."""
        try:
            text, ((start, _),), _ = self._spans(_PROBE)
        except RenderError as error:
            raise UserError(f"the chat template does not work ({error}): give another") from None
        found = self._special.findall(text[start:])
        if not found:
            raise UserError("the chat template has no special token after what the assistant says: it would never end")
        return found[-1]


class ChatEncoder:
    """Of each conversation int32 [2, tokens], its ids and which are learnt; or the reason why it cannot be used."""

    def __init__(self, tokenizer_folder: Path, template: str) -> None:
        self._folder, self._template = tokenizer_folder, template
        self.tokenizer = Tokenizer.load(tokenizer_folder)
        self.renderer = ChatRenderer(self.tokenizer, template)

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatEncoder, (self._folder, self._template)  # a worker loads the tokenizer for itself

    def __call__(self, raw: list[bytes]) -> list[numpy.ndarray | str]:
        return [self._encode(text.decode()) for text in raw]

    def _encode(self, text: str) -> numpy.ndarray | str:
        try:
            return numpy.array(self.renderer.render(parse_messages(text)), numpy.int32)
        except RenderError as error:
            return str(error)
