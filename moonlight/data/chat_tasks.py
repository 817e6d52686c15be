"""Conversations about simple tasks with one right answer each, made from a seed.

What is asked belongs either to training or to the held-out part, by the hash of its content: words in their order,
numbers in any. No held-out question is therefore a training question in other words.
"""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from moonlight.data.conversations import Message
from moonlight.files import atomic_folder, atomic_write_text, write_json

HELD_OUT_SHARE = 0.1
MAX_TURNS = 3
SYSTEM = ("Answer with the result alone.", "Be brief.")
TRAIN_FILE, HELD_OUT_FILE, SETTINGS_FILE = "train.jsonl", "held_out.jsonl", "settings.json"

_TEXT = (
    "list name file line text data code value type class error index string number object method module path time "
    "test return import print open read write call find start stop first last left right true false none size count "
    "key item node tree word page set map get put add run end"
)
_WORDS = _TEXT.split()
_SYLLABLES = [first + second for first in "bdfgklmnprst" for second in "aeiou"]


class TaskExample(NamedTuple):
    """A question and its answer."""

    task: str
    content: str
    """What the question is about: equal for questions that have equal answers for the same reason."""
    question: str
    answer: str


def _words(choice: random.Random, fewest: int, most: int) -> str:
    return " ".join(choice.choices(_WORDS, k=choice.randint(fewest, most)))


def _repeat(choice: random.Random) -> TaskExample:
    words = _words(choice, 2, 4)
    return TaskExample("repeat", words, f"Repeat: {words}", words)


def _last_word(choice: random.Random) -> TaskExample:
    words = _words(choice, 2, 5)
    return TaskExample("last word", words, f"Last word: {words}", words.split()[-1])


def _last_letter(choice: random.Random) -> TaskExample:
    word = "".join(choice.choices(_SYLLABLES, k=choice.randint(2, 3))) + choice.choice(["", *"lnrst"])
    return TaskExample("last letter", word, f"Last letter: {word}", word[-1])


def _count(choice: random.Random) -> TaskExample:
    words = _words(choice, 1, 6)
    return TaskExample("count", words, f"How many words: {words}", str(len(words.split())))


def _larger(choice: random.Random) -> TaskExample:
    one, other = choice.sample(range(100), 2)
    return TaskExample("larger", f"{sorted((one, other))}", f"Larger: {one} or {other}", str(max(one, other)))


def _sum(choice: random.Random) -> TaskExample:
    one, other = choice.randint(0, 20), choice.randint(0, 20)
    return TaskExample("sum", f"{sorted((one, other))}", f"{one} + {other} =", str(one + other))


TASKS: tuple[Callable[[random.Random], TaskExample], ...] = (_repeat, _last_word, _last_letter, _count, _larger, _sum)


def is_held_out(item: TaskExample) -> bool:
    """Whether what it is about belongs to the held-out part."""
    digest = hashlib.blake2b(f"{item.task}: {item.content}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64


def _draw(choice: random.Random, held_out: bool) -> TaskExample:
    make = choice.choice(TASKS)
    while True:
        item = make(choice)
        if is_held_out(item) == held_out:
            return item


def conversation(choice: random.Random, held_out: bool) -> dict[str, Any]:
    """A conversation of one to three questions of one part; `task` is that of the last."""
    messages: list[Message] = []
    if choice.random() < 0.5:
        messages.append({"role": "system", "content": choice.choice(SYSTEM)})
    for _ in range(choice.randint(1, MAX_TURNS)):
        item = _draw(choice, held_out)
        messages.append({"role": "user", "content": item.question})
        messages.append({"role": "assistant", "content": item.answer})
    return {"task": item.task, "messages": messages}


def write_tasks(out: Path, train: int, held_out: int, seed: int) -> bool:
    """Write conversations of both parts as JSONL into the folder `out`; False if it holds these already."""
    settings = {"train": train, "held_out": held_out, "seed": seed, "tasks": [make.__name__[1:] for make in TASKS]}
    known = out / SETTINGS_FILE
    if known.is_file() and json.loads(known.read_text(encoding="utf-8")) == settings:
        return False
    with atomic_folder(out) as part:
        for name, count, is_out in ((TRAIN_FILE, train, False), (HELD_OUT_FILE, held_out, True)):
            choice = random.Random(f"{seed} {name}")
            lines = (json.dumps(conversation(choice, is_out)) + "\n" for _ in range(count))
            atomic_write_text(part / name, "".join(lines))
        write_json(part / SETTINGS_FILE, settings)
    return True
