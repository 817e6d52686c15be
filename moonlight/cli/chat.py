"""The commands for conversations: `moonlight data prepare-chat`, `moonlight sft` and `moonlight quickstart-chat`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from moonlight.errors import UserError

Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value; moonlight/config/run.py has all keys.")]


def add_commands(app: typer.Typer, data_app: typer.Typer) -> None:
    """Add them to the `moonlight` command and to `moonlight data`."""
    data_app.command(
        "prepare-chat",
        epilog="Example: moonlight data prepare-chat --input all.jsonl --tokenizer tok --sequence-length 512 --out sft",
    )(prepare_chat)
    app.command(epilog="Example: moonlight sft configs/sft/quickstart.yaml name=again train.seed=7")(sft)
    app.command("quickstart-chat", epilog="Example: moonlight quickstart-chat name=adamw optimizer.name=adamw")(
        quickstart_chat
    )


def prepare_chat(
    input: Annotated[
        list[Path],
        typer.Option("--input", help="A .jsonl or .jsonl.gz file of conversations, or a folder. Repeatable."),
    ],
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer folder of the model to be tuned.")],
    sequence_length: Annotated[int, typer.Option(help="data.sequence_length of the run; longer ones are set aside.")],
    out: Annotated[Path, typer.Option(help="Folder to write: .bin/.idx/.mask files and manifest.json.")],
    template: Annotated[
        str, typer.Option(help="own (the tokenizer folder's, or Moonlight's if it has none) or moonlight.")
    ] = "own",
    messages_field: Annotated[str, typer.Option(help="JSONL key of the list of messages.")] = "messages",
    validation_share: Annotated[float, typer.Option(help="Share held out, chosen by hash.")] = 0.05,
    packing: Annotated[bool, typer.Option(help="Several conversations in a sequence.")] = True,
    max_bad_share: Annotated[float, typer.Option(help="Largest share of conversations that may be unusable.")] = 1.0,
    license: Annotated[str, typer.Option(help="Licence of the conversations, for the manifest.")] = "unknown",
    workers: Annotated[int, typer.Option(help="Encoding processes; 0 takes one per core.")] = 0,
) -> None:
    """Render, encode and pack conversations: {"messages": [{"role": "user", "content": "..."}, ...]}, one a line.

    Roles are system, user, assistant and tool (which the model reads as a user's turn). Text that spells a special
    token stays text.
    """
    from moonlight.data.prepare_chat import prepare_chat as prepare

    manifest = prepare(
        input,
        tokenizer,
        out,
        sequence_length=sequence_length,
        template=template,
        messages_field=messages_field,
        validation_share=validation_share,
        packing=packing,
        max_bad_share=max_bad_share,
        license=license,
        workers=workers or os.cpu_count() or 1,
    )
    for name, split in manifest["splits"].items():
        print(f"{name}: {describe(split, sequence_length)}")
    if manifest["bad_records"]:
        print(f"{manifest['bad_records']:,} cannot be used and are listed in {out / 'quarantine.jsonl'}:")
        for kind, count in manifest["bad_by_reason"].items():
            print(f"  {count:,} {kind}; the first is {manifest['first_bad'][kind].replace(f': {kind}: ', ': ')}")


def describe(split: dict[str, Any], sequence_length: int) -> str:
    """What a split holds, in words."""
    filled = split["tokens"] / (split["windows"] * sequence_length)
    return (
        f"{split['documents']:,} conversations, {split['tokens']:,} tokens, {split['counted_tokens']:,} of them "
        f"learnt, in {split['windows']:,} sequences ({filled:.1%} filled)"
    )


def sft(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe with data.conversations and train.initial_checkpoint.")],
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Go on with a run of other settings.")] = False,
) -> None:
    """Tune a checkpoint on conversations, or go on where the run stopped. As `moonlight pretrain` in all else."""
    from pretrain.command import train_command

    train_command(recipe, overrides or [], force=force, conversations=True)


def quickstart_chat(
    base: Annotated[Path, typer.Option(help="Run folder of the quickstart.")] = Path("runs/quickstart"),
    recipe: Annotated[Path, typer.Option(help="Recipe to tune with.")] = Path("configs/sft/quickstart.yaml"),
    overrides: Overrides = None,
) -> None:
    """Tune the quickstart's model on simple tasks, and measure exact match before and after."""
    if not base.is_dir():
        raise UserError(f"{base} does not exist: `make quickstart` trains the model that this tunes")
    from moonlight.cli.quickstart_chat import quickstart_chat as go

    go(base, recipe, overrides or [])
