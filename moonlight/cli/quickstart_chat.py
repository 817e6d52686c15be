"""Instruction tuning in one command: simple tasks, tuning, export, and exact match before and after.

As in the quickstart, each step appears whole or not at all, and a step whose result is there is done.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moonlight.cli.quickstart import step
from moonlight.config.load import load_recipe
from moonlight.data.chat_tasks import HELD_OUT_FILE, TRAIN_FILE, write_tasks
from moonlight.dist_checkpoint.state import complete_checkpoints
from moonlight.errors import UserError
from moonlight.files import sha256_checksum, write_json
from moonlight.train import run_folder

TRAIN_CONVERSATIONS, HELD_OUT_CONVERSATIONS, SEED = 12_000, 600, 1
RESULT_FILE = "exact_match.json"


def quickstart_chat(base: Path, recipe: Path, overrides: Sequence[str]) -> None:
    """Tune the newest checkpoint of the run `base` with `recipe` on tasks made here, and measure.

    Raises:
        UserError: there is no such run, or the recipe cannot be used.
        SystemExit: a step failed; it has said why.
    """
    started = time.monotonic()
    if not complete_checkpoints(base):
        raise UserError(f"{base} has no checkpoint: `make quickstart` trains the model that this tunes")
    own = {"train.initial_checkpoint": base, "data.tokenizer": base / "tokenizer"}
    overrides = [*(f"{key}={value}" for key, value in own.items()), *overrides]
    config = load_recipe(recipe, overrides)
    folder, data = run_folder.run_path(config), Path(config.data.path)
    tasks = data.parent / "tasks"
    if write_tasks(tasks, TRAIN_CONVERSATIONS, HELD_OUT_CONVERSATIONS, SEED):
        print(f"{tasks}: {TRAIN_CONVERSATIONS:,} conversations to learn from, {HELD_OUT_CONVERSATIONS} held out")
    step(
        "conversations",
        *("data", "prepare-chat", "--input", tasks / TRAIN_FILE, "--tokenizer", config.data.tokenizer),
        *("--sequence-length", config.data.sequence_length, "--out", data),
    )
    step("tuning", "sft", recipe, *overrides)
    before, after = folder / "before", folder / "hf"
    step("export, before", "export", base, "--out", before, "--chat", "--tokenizer", config.data.tokenizer)
    step("export, after", "export", folder, "--out", after, "--chat")
    shares = _measure({"before": before, "after": after}, tasks / HELD_OUT_FILE, folder / RESULT_FILE)

    table = Table("held-out task", "conversations", "exact before", "exact after")
    for task, found in shares["after"].items():
        own_before = shares["before"][task]["exact"]
        table.add_row(task, f"{found['conversations']}", f"{own_before:.1%}", f"{found['exact']:.1%}")
    console = Console(highlight=False)
    console.rule(f"done, {time.monotonic() - started:.0f} s in this call")
    console.print(table)
    console.print(f"answers: {folder / RESULT_FILE}\nmodel:   {after}", soft_wrap=True)
    more = f'ask it:  .venv/bin/moonlight generate {after} --chat --prompt "Last word: read the file"'
    console.print(more, markup=False, soft_wrap=True)


def _measure(folders: dict[str, Path], held_out: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Shares of exact answers by task for each folder. `out` keeps them with every answer, folder by folder."""
    from eval.exact_match import exact_match_by_task, generate_answers

    lines = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    conversations, tasks = [line["messages"] for line in lines], [line["task"] for line in lines]
    there = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    known = {name: there[name] for name in folders if name in there}
    for name, path in folders.items():
        made_from = {"export": sha256_checksum(path / "export.json"), "conversations": sha256_checksum(held_out)}
        if name in known and known[name]["made_from"] == made_from:
            print(f"== exact match, {name}: done already")
            continue
        print(f"== exact match, {name}: greedy answers by plain transformers", flush=True)
        given = generate_answers(path, conversations)
        said = [
            {"task": task, "conversation": messages[:-1], **dataclasses.asdict(answer), "exact": answer.is_exact}
            for task, messages, answer in zip(tasks, conversations, given, strict=True)
        ]
        known[name] = {"made_from": made_from, "shares": exact_match_by_task(given, tasks), "answers": said}
        write_json(out, known)
    return {name: known[name]["shares"] for name in folders}
