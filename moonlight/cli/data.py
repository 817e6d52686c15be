"""Commands that prepare data: `moonlight tokenizer train`, `moonlight data prepare`, `moonlight data prepare-chat`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from moonlight.cli.options import command_group

tokenizer_app = command_group("Train tokenizers.")
data_app = command_group("Prepare training data.")

Inputs = Annotated[
    list[Path], typer.Option("--input", help="A text, .jsonl, .jsonl.gz or .parquet file, or a folder. Repeatable.")
]
TextField = Annotated[str, typer.Option(help="JSONL key or Parquet column that holds the text.")]
ValidationShare = Annotated[float, typer.Option(help="Fraction of documents held out, chosen by a hash of their text.")]
Workers = Annotated[int, typer.Option(help="Encoding processes; 0: one per core.")]


@tokenizer_app.command("train", epilog="Example: moonlight tokenizer train --input corpus/ --vocab-size 4096 --out tok")
def tokenizer_train(
    input: Inputs,
    vocab_size: Annotated[int, typer.Option(help="Number of ids, including control and byte pieces.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    text_field: TextField = "text",
) -> None:
    """Train a SentencePiece tokenizer and save it with the Hugging Face fast tokenizer made from it."""
    from moonlight.data.tokenizer_train import train_tokenizer

    train_tokenizer(input, vocab_size, out, text_field=text_field, threads=os.cpu_count() or 1)
    print(f"{out}: {vocab_size:,} ids")


@data_app.command("prepare", epilog="Example: moonlight data prepare --input corpus/ --tokenizer tok --out data")
def data_prepare(
    input: Inputs,
    tokenizer: Annotated[Path, typer.Option(help="Folder of `moonlight tokenizer train`, or of a Hugging Face model.")],
    out: Annotated[Path, typer.Option(help="Folder to write: .bin/.idx files and manifest.json.")],
    text_field: TextField = "text",
    validation_share: ValidationShare = 0.05,
    max_bad_share: Annotated[float, typer.Option(help="Largest accepted fraction of bad records.")] = 0.01,
    license: Annotated[str, typer.Option(help="License of the text, for the manifest.")] = "unknown",
    workers: Workers = 0,
) -> None:
    """Encode text, JSONL or Parquet into Megatron's indexed format, with held-out documents and a manifest."""
    from moonlight.data.prepare import prepare

    manifest = prepare(
        input,
        tokenizer,
        out,
        text_field=text_field,
        validation_share=validation_share,
        workers=workers or os.cpu_count() or 1,
        max_bad_share=max_bad_share,
        license=license,
    )
    for name, split in manifest["splits"].items():
        rate = split["bytes"] / split["tokens"]
        print(
            f"{name}: {split['documents']:,} documents, {split['bytes']:,} bytes, {split['tokens']:,} tokens "
            f"({rate:.2f} bytes per token)"
        )
    if manifest["bad_records"]:
        print(f"{manifest['bad_records']:,} bad records are listed in {out / 'quarantine.jsonl'}")


@data_app.command(
    "prepare-chat",
    epilog="Example: moonlight data prepare-chat --input all.jsonl --tokenizer tok --sequence-length 512 --out sft",
)
def prepare_chat(
    input: Annotated[
        list[Path],
        typer.Option("--input", help="A .jsonl or .jsonl.gz file of conversations, or a folder. Repeatable."),
    ],
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer folder of the model to tune.")],
    sequence_length: Annotated[
        int, typer.Option(help="data.sequence_length of the run; longer conversations are quarantined.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write: .bin/.idx/.mask files and manifest.json.")],
    template: Annotated[
        str, typer.Option(help="own (the tokenizer folder's, or Moonlight's if it has none) or moonlight.")
    ] = "own",
    messages_field: Annotated[str, typer.Option(help="JSONL key of the list of messages.")] = "messages",
    validation_share: ValidationShare = 0.05,
    packing: Annotated[bool, typer.Option(help="Put several conversations into a sequence.")] = True,
    max_bad_share: Annotated[float, typer.Option(help="Largest accepted fraction of unusable conversations.")] = 1.0,
    license: Annotated[str, typer.Option(help="License of the conversations, for the manifest.")] = "unknown",
    workers: Workers = 0,
) -> None:
    """Render, encode and pack conversations: {"messages": [{"role": "user", "content": "..."}, ...]}, one per line.

    Roles are system, user, assistant and tool (which the model reads as a user's turn). Text that spells a special
    token stays text.
    """
    from moonlight.data.prepare_chat import prepare_chat

    manifest = prepare_chat(
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
        filled = split["tokens"] / (split["windows"] * sequence_length)
        print(
            f"{name}: {split['documents']:,} conversations, {split['tokens']:,} tokens, {split['counted_tokens']:,} of "
            f"them trained on, in {split['windows']:,} sequences ({filled:.1%} filled)"
        )
    if manifest["bad_records"]:
        print(f"{manifest['bad_records']:,} unusable conversations are listed in {out / 'quarantine.jsonl'}:")
        for kind, count in manifest["bad_by_reason"].items():
            print(f"  {count:,} {kind}; the first is {manifest['first_bad'][kind].replace(f': {kind}: ', ': ')}")
