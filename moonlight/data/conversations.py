"""Read conversations from JSONL: one list of messages per line, each with its role and text.

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

Roles are system, user, assistant and tool. A line that cannot be used is a bad record with its location and a reason
of the form "kind: details".
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from moonlight.data.documents import Record, check_text, read_lines

ROLES = ("system", "user", "assistant", "tool")

Message = dict[str, str]
"""`role` and `content`."""


def read_conversations(file: Path, field: str = "messages") -> Iterator[Record]:
    """Yield a record for every line of a JSONL file; its text is the JSON that `parse_messages` reads.

    Args:
        field: key of the list of messages.

    Raises:
        UserError: the file cannot be opened.
    """
    return read_lines(file, partial(_extract_messages, field=field))


def parse_messages(text: str) -> list[Message]:
    """Return the messages of a record that `read_conversations` yields."""
    return [{"role": role, "content": content} for role, content in json.loads(text)]


def _extract_messages(value: dict[str, Any], field: str) -> tuple[str | None, str]:
    """Return the messages as JSON [[role, text], ...], or None and the reason why they cannot be used."""
    messages = value.get(field)
    if not isinstance(messages, list):
        hint = ""
        if isinstance(value.get("conversations"), list):  # the ShareGPT format
            hint = "; convert 'conversations' of from and value to messages of role and content"
        return None, f"no messages: expected field {field!r} with a list of messages{hint}"
    turns = []
    for index, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            return None, f"not a message: message {index} is {type(message).__name__}, not an object"
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            return None, f"unknown role: message {index} has {str(role)[:40]!r}, accepted are {', '.join(ROLES)}"
        if message.get("tool_calls"):
            return None, f"tool calls: message {index} has tool_calls; write them as text"
        if content is None or content == []:
            content = ""
        text, reason = check_text(content, f"message {index}")
        if text is None:
            return None, f"not text: {reason}"
        if not text.strip():
            return None, f"empty text: message {index} of {role}"
        turns.append((role, text))
    if all(role != "assistant" for role, _ in turns):
        return None, f"no assistant turn: among {len(turns)} messages"
    return json.dumps(turns, ensure_ascii=False), ""
