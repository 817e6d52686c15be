"""Conversations about simple tasks with one correct answer each, generated from a seed.

A hash of a question's content assigns it to the training or the held-out part. The content keeps the order of words but
not of numbers. No held-out question is therefore a training question in a different wording.
"""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from moonlight.data.conversations import Message
from moonlight.files import atomic_folder, atomic_write_text, write_json

HELD_OUT_FRACTION = 0.1
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
    """The operands of the question: equal for questions that differ only in wording or in the order of numbers."""
    question: str
    answer: str


def _words(generator: random.Random, min_words: int, max_words: int) -> str:
    return " ".join(generator.choices(_WORDS, k=generator.randint(min_words, max_words)))


def _repeat(generator: random.Random) -> TaskExample:
    words = _words(generator, 2, 4)
    return TaskExample("repeat", words, f"Repeat: {words}", words)


def _last_word(generator: random.Random) -> TaskExample:
    words = _words(generator, 2, 5)
    return TaskExample("last word", words, f"Last word: {words}", words.split()[-1])


def _last_letter(generator: random.Random) -> TaskExample:
    word = "".join(generator.choices(_SYLLABLES, k=generator.randint(2, 3))) + generator.choice(["", *"lnrst"])
    return TaskExample("last letter", word, f"Last letter: {word}", word[-1])


def _count(generator: random.Random) -> TaskExample:
    words = _words(generator, 1, 6)
    return TaskExample("count", words, f"How many words: {words}", str(len(words.split())))


def _larger(generator: random.Random) -> TaskExample:
    a, b = generator.sample(range(100), 2)
    return TaskExample("larger", f"{sorted((a, b))}", f"Larger: {a} or {b}", str(max(a, b)))


def _sum(generator: random.Random) -> TaskExample:
    a, b = generator.randint(0, 20), generator.randint(0, 20)
    return TaskExample("sum", f"{sorted((a, b))}", f"{a} + {b} =", str(a + b))


TASKS: tuple[Callable[[random.Random], TaskExample], ...] = (_repeat, _last_word, _last_letter, _count, _larger, _sum)


def is_held_out(example: TaskExample) -> bool:
    """Return whether the question belongs to the held-out part."""
    digest = hashlib.blake2b(f"{example.task}: {example.content}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_FRACTION * 2**64


def _draw(generator: random.Random, held_out: bool) -> TaskExample:
    task = generator.choice(TASKS)
    while True:
        example = task(generator)
        if is_held_out(example) == held_out:
            return example


def conversation(generator: random.Random, held_out: bool) -> dict[str, Any]:
    """Return a conversation of one to three questions of one part: `messages`, and the `task` of the last question."""
    messages: list[Message] = []
    if generator.random() < 0.5:
        messages.append({"role": "system", "content": generator.choice(SYSTEM)})
    for _ in range(generator.randint(1, MAX_TURNS)):
        example = _draw(generator, held_out)
        messages.append({"role": "user", "content": example.question})
        messages.append({"role": "assistant", "content": example.answer})
    return {"task": example.task, "messages": messages}


def write_tasks(out: Path, train: int, held_out: int, seed: int) -> bool:
    """Write conversations of both parts as JSONL into the folder `out`; return False if it already contains them."""
    settings = {"train": train, "held_out": held_out, "seed": seed, "tasks": [task.__name__[1:] for task in TASKS]}
    settings_path = out / SETTINGS_FILE
    if settings_path.is_file() and json.loads(settings_path.read_text(encoding="utf-8")) == settings:
        return False
    with atomic_folder(out) as part:
        for name, count, is_held_out_part in ((TRAIN_FILE, train, False), (HELD_OUT_FILE, held_out, True)):
            generator = random.Random(f"{seed} {name}")
            lines = (json.dumps(conversation(generator, is_held_out_part)) + "\n" for _ in range(count))
            atomic_write_text(part / name, "".join(lines))
        write_json(part / SETTINGS_FILE, settings)
    return True
