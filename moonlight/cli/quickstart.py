"""The full pipeline in one command: each step runs one `moonlight` command in a separate process.

Each step writes its result atomically, and a step whose result exists is skipped. A rerun after an interruption at any
moment is therefore byte-identical to an uninterrupted run.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from moonlight.config.load import load_recipe
from moonlight.errors import UserError
from moonlight.files import atomic_write_text
from moonlight.train import run_folder

PROMPT = "import os\n\n\ndef main(argv):\n"
NEW_TOKENS = 96
TEMPERATURE = 0.6
VALIDATION_SHARE = 0.1


def quickstart(corpus: Path | None, recipe: Path, overrides: Sequence[str]) -> None:
    """Prepare `corpus`, train with `recipe`, export, verify and complete a prompt. Finished steps are skipped.

    Args:
        corpus: folder or file of text; None: the sources of Python's standard library.
        recipe: YAML recipe.
        overrides: section.key=value settings of the recipe.

    Raises:
        UserError: the corpus or recipe cannot be used.
        SystemExit: a step failed and printed the reason; carries its exit code.
    """
    started = time.monotonic()
    if corpus is None:
        corpus = Path(sysconfig.get_path("stdlib"))
    else:
        # Each corpus has a separate run folder.
        name = f"quickstart-{corpus.resolve().stem}"
        settings = {"name": name, "data.path": f"runs/{name}/data", "data.tokenizer": f"runs/{name}/tokenizer"}
        overrides = [*(f"{key}={value}" for key, value in settings.items()), *overrides]
    if not corpus.exists():
        raise UserError(f"corpus {corpus} does not exist: give a folder or file of text")
    if not recipe.exists():
        raise UserError(f"recipe {recipe} does not exist: run the command in the repository, or give --recipe")
    config = load_recipe(recipe, overrides)
    if config.data.sources:
        raise UserError(f"recipe {recipe} has data.sources: quickstart prepares one folder; set data.path instead")
    folder = run_folder.run_path(config)
    tokenizer, data, hugging_face = Path(config.data.tokenizer), Path(config.data.path), folder / "hf"
    completion = folder / "completion.txt"

    print(f"corpus: {corpus}")
    step(
        "tokenizer",
        *("tokenizer", "train", "--input", corpus, "--vocab-size", config.model.vocab_size, "--out", tokenizer),
    )
    step(
        "data",
        *("data", "prepare", "--input", corpus, "--tokenizer", tokenizer, "--out", data),
        *("--validation-share", VALIDATION_SHARE),
    )
    step("training", "pretrain", recipe, *overrides)
    step("export", "export", folder, "--out", hugging_face)
    if completion.exists() and completion.stat().st_mtime >= (hugging_face / "export.json").stat().st_mtime:
        print("== verification, completion: done already")
    else:
        step("verification", "verify", folder, hugging_face)
        step(
            "completion",
            *("generate", hugging_face, "--prompt", PROMPT, "--max-new-tokens", NEW_TOKENS),
            *("--temperature", TEMPERATURE),
            out=completion,
        )

    console = Console(highlight=False)
    console.rule(f"done, {time.monotonic() - started:.0f} s in this call")
    for name, path in (
        ("tokenizer", tokenizer),
        ("data", data),
        ("metrics", folder / "metrics.jsonl"),
        ("loss curve", folder / "loss.png"),
        ("checkpoints", folder / "checkpoints"),
        ("model", hugging_face),
    ):
        console.print(f"{name:12} {path}")
    console.rule("completion by the exported model")
    print(completion.read_text(encoding="utf-8"))
    console.rule()
    more = f'more: .venv/bin/moonlight generate {hugging_face} --prompt "import os" --temperature 0.6'
    console.print(more, markup=False, soft_wrap=True)


def step(name: str, *arguments: object, out: Path | None = None) -> None:
    """Run one `moonlight` command in a separate process; with `out`, write its standard output to that file.

    Raises:
        SystemExit: the command failed; carries its exit code.
    """
    print(f"== {name}: moonlight {shlex.join(map(str, arguments))}".replace("\n", "\\n"), flush=True)
    command = [sys.executable, "-m", "moonlight.cli", *map(str, arguments)]
    environment = os.environ | {"MOONLIGHT_PART_OF_QUICKSTART": "1"}
    result = subprocess.run(command, stdout=subprocess.PIPE if out else None, text=True, env=environment)
    if result.returncode:
        raise SystemExit(result.returncode)
    if out:
        atomic_write_text(out, result.stdout)
