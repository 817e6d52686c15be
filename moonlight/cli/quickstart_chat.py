"""Instruction tuning in one command: simple tasks, tuning, export, and exact match before and after.

As in the quickstart, each step writes its result atomically, and a step whose result exists is skipped.
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
    """Tune the newest checkpoint of a run on generated tasks, and measure exact match before and after.

    Args:
        base: run folder of the quickstart.
        recipe: YAML recipe to tune with.
        overrides: section.key=value settings of the recipe.

    Raises:
        UserError: `base` has no checkpoint, or the recipe cannot be used.
        SystemExit: a step failed and printed the reason; carries its exit code.
    """
    started = time.monotonic()
    if not complete_checkpoints(base):
        raise UserError(f"{base} has no checkpoint: `make quickstart` trains the model to tune")
    settings = {"train.initial_checkpoint": base, "data.tokenizer": base / "tokenizer"}
    overrides = [*(f"{key}={value}" for key, value in settings.items()), *overrides]
    config = load_recipe(recipe, overrides)
    folder, data = run_folder.run_path(config), Path(config.data.path)
    tasks = data.parent / "tasks"
    if write_tasks(tasks, TRAIN_CONVERSATIONS, HELD_OUT_CONVERSATIONS, SEED):
        print(f"{tasks}: {TRAIN_CONVERSATIONS:,} conversations to train on, {HELD_OUT_CONVERSATIONS} held out")
    step(
        "conversations",
        *("data", "prepare-chat", "--input", tasks / TRAIN_FILE, "--tokenizer", config.data.tokenizer),
        *("--sequence-length", config.data.sequence_length, "--out", data),
    )
    step("tuning", "sft", recipe, *overrides)
    before, after = folder / "before", folder / "hf"
    step("export, before", "export", base, "--out", before, "--chat", "--tokenizer", config.data.tokenizer)
    step("export, after", "export", folder, "--out", after, "--chat")
    results = _measure({"before": before, "after": after}, tasks / HELD_OUT_FILE, folder / RESULT_FILE)

    table = Table("held-out task", "conversations", "exact before", "exact after")
    for task, result in results["after"].items():
        exact_before = results["before"][task]["exact"]
        table.add_row(task, f"{result['conversations']}", f"{exact_before:.1%}", f"{result['exact']:.1%}")
    console = Console(highlight=False)
    console.rule(f"done, {time.monotonic() - started:.0f} s in this call")
    console.print(table)
    console.print(f"answers: {folder / RESULT_FILE}\nmodel:   {after}", soft_wrap=True)
    more = f'ask:     .venv/bin/moonlight generate {after} --chat --prompt "Last word: read the file"'
    console.print(more, markup=False, soft_wrap=True)


def _measure(folders: dict[str, Path], held_out: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Return the fraction of exact answers and the number of conversations, by task, for each folder.

    Writes them and every answer to `out` after each folder. Skips folders whose results in `out` are up to date.

    Args:
        folders: Hugging Face folders by name.
        held_out: JSONL file of conversations with `messages` and `task`.
        out: JSON file of the results.
    """
    from eval.exact_match import exact_match_by_task, generate_answers

    lines = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    conversations, tasks = [line["messages"] for line in lines], [line["task"] for line in lines]
    stored = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    results = {name: stored[name] for name in folders if name in stored}
    for name, path in folders.items():
        made_from = {"export": sha256_checksum(path / "export.json"), "conversations": sha256_checksum(held_out)}
        if name in results and results[name]["made_from"] == made_from:
            print(f"== exact match, {name}: done already")
            continue
        print(f"== exact match, {name}: greedy answers with plain transformers", flush=True)
        answers = generate_answers(path, conversations)
        records = [
            {"task": task, "conversation": messages[:-1], **dataclasses.asdict(answer), "exact": answer.is_exact}
            for task, messages, answer in zip(tasks, conversations, answers, strict=True)
        ]
        results[name] = {"made_from": made_from, "shares": exact_match_by_task(answers, tasks), "answers": records}
        write_json(out, results)
    return {name: results[name]["shares"] for name in folders}
