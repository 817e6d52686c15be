"""Reading conversations: JSONL with a list of messages a line, each with its role and its text.

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

Roles are system, user, assistant and tool. What cannot be used is a bad record with its place and reason, the kind of
which comes before the colon.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moonlight.data.documents import Record, checked_text, read_lines
from moonlight.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
SUFFIXES = (".jsonl", ".jsonl.gz")

Message = dict[str, str]
"""`role` and `content`."""


def check_files(files: Sequence[Path]) -> None:
    """Raise UserError unless all are JSONL."""
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise UserError(f"input {file} holds no conversations: a .jsonl or .jsonl.gz file is expected")


def read_conversations(file: Path, field: str = "messages") -> Iterator[Record]:
    """Yield every line of a JSONL file; the text of a good one is the JSON of its messages, for `parse`.

    Args:
        field: key of the list of messages.

    Raises:
        UserError: the file cannot be opened.
    """
    return read_lines(file, partial(_messages_of, field=field))


def parse_messages(text: str) -> list[Message]:
    """The messages of a good record."""
    return [{"role": role, "content": content} for role, content in json.loads(text)]


def _messages_of(value: dict[str, Any], field: str) -> tuple[str | None, str]:
    """The messages as JSON of roles and texts alone, or None and why they cannot be used."""
    messages = value.get(field)
    if not isinstance(messages, list):
        hint = ""
        if isinstance(value.get("conversations"), list):  # the shape of ShareGPT
            hint = "; 'conversations' of from and value must be written as messages of role and content"
        return None, f"no messages: field {field!r} with a list of them is expected{hint}"
    found = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            return None, f"not a message: number {number} is {type(message).__name__}, not an object"
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            return None, f"unknown role: message {number} has {str(role)[:40]!r}, accepted are {', '.join(ROLES)}"
        if message.get("tool_calls"):
            return None, f"tool calls: message {number} has some beside its text; write them as text"
        if content is None or content == []:
            content = ""
        text, reason = checked_text(content, f"message {number}")
        if text is None:
            return None, f"not text: {reason}"
        if not text.strip():
            return None, f"empty text: message {number} of {role}"
        found.append((role, text))
    if all(role != "assistant" for role, _ in found):
        return None, f"no assistant turn: among {len(found)} messages"
    return json.dumps(found, ensure_ascii=False), ""
