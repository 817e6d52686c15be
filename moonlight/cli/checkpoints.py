"""Commands between checkpoints and Hugging Face folders: export, import, average, verify, release."""

from pathlib import Path
from typing import Annotated

import typer

from moonlight.cli.options import command_group
from moonlight.errors import UserError

app = command_group()

Source = Annotated[Path, typer.Argument(help="A run folder, or one checkpoint.")]


@app.command(epilog="Example: moonlight export runs/quickstart --out hf --dtype bfloat16 --license apache-2.0")
def export(
    source: Source,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    dtype: Annotated[str, typer.Option(help="float32 (the master weights) or bfloat16.")] = "float32",
    max_shard_size: Annotated[int, typer.Option(help="Maximum size of a safetensors file, in MB.")] = 5000,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder; default: the checkpoint's.")] = None,
    revision_step: Annotated[
        int | None, typer.Option(help="Export the checkpoint after this step, to be released as the revision step-N.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="For an instruction-tuned model: generation ends at <|im_end|>.")
    ] = False,
    untie: Annotated[
        bool, typer.Option("--untie", help="Also write tied embeddings as the head, which vLLM needs.")
    ] = False,
    license: Annotated[str | None, typer.Option(help="License of the model, such as apache-2.0.")] = None,
    repo: Annotated[str | None, typer.Option(help="Its name on the Hub (owner/name), for the card's examples.")] = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder for transformers, vLLM and SGLang."""
    from checkpoints.export import export

    if max_shard_size < 1:
        raise UserError(f"--max-shard-size is {max_shard_size}: it must be at least 1 (megabyte)")
    written = export(
        source,
        out,
        dtype=dtype,
        max_shard_bytes=max_shard_size * 10**6,
        tokenizer=tokenizer,
        revision_step=revision_step,
        chat=chat,
        untie=untie,
        license=license,
        repo=repo,
    )
    print(f"{out}: written" if written else f"{out}: this checkpoint is exported already")


@app.command("import", epilog="Example: moonlight import Moonlight-16B-A3B --out checkpoints/moonlight")
def import_(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face folder of the DeepSeek-V3 architecture.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")],
) -> None:
    """Convert a Hugging Face folder to a checkpoint that any layout can train from. None of its code is run."""
    from checkpoints.hf_import import import_folder

    if import_folder(folder, out):
        print(f"{out}: written; {out / 'recipe.yaml'} is the start of a recipe that trains from it")
    else:
        print(f"{out}: this folder is imported already")


@app.command(epilog="Example: moonlight average runs/quickstart --last 2 --out runs/quickstart-average")
def average(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    last: Annotated[int, typer.Option(help="Number of newest checkpoints.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")],
) -> None:
    """Write a checkpoint whose weights are the mean of a run's newest checkpoints."""
    from checkpoints.average import average

    if steps := average(run, last, out):
        print(f"{out}: the mean of the checkpoints after steps {', '.join(map(str, steps))}")
    else:
        print(f"{out}: this mean is written already")


@app.command(epilog="Example: moonlight verify runs/quickstart runs/quickstart/hf")
def verify(
    source: Source,
    folder: Annotated[Path, typer.Argument(help="The Hugging Face folder that it was exported to or imported from.")],
    tensors_only: Annotated[
        bool, typer.Option("--tensors-only", help="Skip the logits, for a model larger than memory.")
    ] = False,
) -> None:
    """Compare a checkpoint with a Hugging Face folder: tensors, then logits and routes. Exits 1 on a difference."""
    from checkpoints.verify import print_report, verify

    report = verify(source, folder, tensors_only=tensors_only)
    print_report(report)
    if not report.passed:
        raise typer.Exit(1)


@app.command(epilog="Example: moonlight release runs/mine/hf --repo my-name/my-model --dry-run")
def release(
    folder: Annotated[Path, typer.Argument(help="The exported and verified Hugging Face folder.")],
    repo: Annotated[str, typer.Option(help="Repository on the Hugging Face Hub, as owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Run the checks and list the files, offline.")] = False,
) -> None:
    """Check an exported folder and upload it to the Hugging Face Hub. A second run uploads only what is missing."""
    from checkpoints.release import check_release, print_release

    checked = check_release(folder, repo)
    if dry_run:
        print_release(checked, private=private)
        print("dry run: nothing was uploaded")
        return
    from checkpoints.hub import upload

    done = upload(checked, private=private)
    for name in done.removed:
        print(f"{name}: removed from the Hub, it is not part of this release")
    if done.sent:
        total = len(checked.files)
        print(f"{len(done.sent)} of {total} files uploaded, all {total} compared with the Hub's")
    elif not done.removed:
        print("all files are uploaded already")
    print(done.url)
