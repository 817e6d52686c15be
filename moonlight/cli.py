"""The `moonlight` command. Every command imports what it needs when it runs, so that --help is instant."""

import os
import sys
from pathlib import Path
from typing import Annotated, cast

import typer

from moonlight.errors import CODE_INTERRUPTED, UserError, report_errors

app = typer.Typer(
    help="From a folder of text to a Hugging Face model, trained with Muon. Start with: moonlight quickstart",
    epilog="Any command takes --debug, which prints the whole traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
tokenizer_app = typer.Typer(help="Train tokenizers.", no_args_is_help=True, rich_markup_mode=None)
data_app = typer.Typer(help="Prepare training data.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
bench_app = typer.Typer(help="Measure against other implementations.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench_app, name="bench")

_UsageError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])
"""What the command line raises for arguments it cannot use; Typer exports no name for it."""

PART_OF_QUICKSTART = "MOONLIGHT_PART_OF_QUICKSTART"
"""Set for the commands that quickstart runs: it speaks for them when it is interrupted."""

Inputs = Annotated[
    list[Path],
    typer.Option("--input", help="A text, .jsonl, .jsonl.gz or .parquet file, or a folder. Repeatable."),
]
TextField = Annotated[str, typer.Option(help="JSONL key or Parquet column that holds the text.")]


@tokenizer_app.command("train", epilog="Example: moonlight tokenizer train --input corpus/ --vocab-size 4096 --out tok")
def tokenizer_train(
    input: Inputs,
    vocab_size: Annotated[int, typer.Option(help="Number of ids, control and byte pieces included.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    text_field: TextField = "text",
) -> None:
    """Train a SentencePiece tokenizer, saved with the Hugging Face fast tokenizer made from it."""
    from moonlight.data.tokenizer import train_tokenizer

    train_tokenizer(input, vocab_size, out, text_field=text_field, threads=os.cpu_count() or 1)
    print(f"{out}: {vocab_size:,} ids")


@data_app.command("prepare", epilog="Example: moonlight data prepare --input corpus/ --tokenizer tok --out data")
def data_prepare(
    input: Inputs,
    tokenizer: Annotated[Path, typer.Option(help="Folder of `moonlight tokenizer train`.")],
    out: Annotated[Path, typer.Option(help="Folder to write: .bin/.idx files and manifest.json.")],
    text_field: TextField = "text",
    validation_share: Annotated[float, typer.Option(help="Share of documents held out, chosen by hash.")] = 0.05,
    max_bad_share: Annotated[float, typer.Option(help="Largest share of records that may be bad.")] = 0.01,
    license: Annotated[str, typer.Option(help="Licence of the text, for the manifest.")] = "unknown",
    workers: Annotated[int, typer.Option(help="Encoding processes; 0 takes one per core.")] = 0,
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


@bench_app.callback()
def bench() -> None:
    """Measure against other implementations."""


@bench_app.command("optimizer", epilog="Example: moonlight bench optimizer --rounds 9 --json optimizer.json")
def bench_optimizer(
    rounds: Annotated[int, typer.Option(help="Rounds in which the cases take turns.")] = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Annotated[Path | None, typer.Option(help="File to write the figures to as well.")] = None,
) -> None:
    """Muon's accuracy, then its speed against other Muons. Exits 1 if a figure misses its gate or bar."""
    from moonlight.bench.optimizer import bench_optimizer as measure

    if not measure(rounds, device, json):
        raise typer.Exit(1)


@app.command(epilog="Example: moonlight pretrain configs/quickstart.yaml train.seed=7 name=seed7")
def pretrain(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value; moonlight/config.py has all keys.")
    ] = None,
) -> None:
    """Train, or go on where the run stopped. Starts the recipe's local processes unless torchrun did."""
    from moonlight.config_io import load_recipe
    from moonlight.train import run_folder
    from pretrain.launch import launch, under_launcher

    run = load_recipe(recipe, overrides or [])
    if under_launcher():
        from pretrain.__main__ import work

        work(run)
        return
    run.num_microbatches(run.parallel.num_processes)
    run_folder.check_data(run)
    run_folder.check_folder(run_folder.path(run), run)
    if run_folder.is_finished(run):
        print(f"{run_folder.path(run)}: this run has finished already")
        return
    arguments = [str(recipe), *(overrides or [])]
    launch(run.parallel.num_processes, arguments, run.train.threads_per_process)


@app.command(epilog="Example: moonlight plan configs/moonlight_16b_a3b/pretrain.yaml --parameters --gpus 64")
def plan(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value; moonlight/config.py has all keys.")
    ] = None,
    parameters: Annotated[
        bool, typer.Option("--parameters", help="List every parameter: its rule, its matrices, who owns it.")
    ] = False,
    gpus: Annotated[int | None, typer.Option(help="Processes; by default the recipe's parallel.num_processes.")] = None,
) -> None:
    """Show what a recipe's optimizer would own, keep and send on N processes, without starting them."""
    from moonlight.config_io import load_recipe

    run = load_recipe(recipe, overrides or [])
    if gpus is not None and gpus < 1:
        raise UserError(f"--gpus is {gpus}: it must be at least 1")

    from moonlight.plan import make_plan, print_plan

    print_plan(make_plan(run, run.parallel.num_processes if gpus is None else gpus), parameters=parameters)


@app.command(epilog="Example: moonlight export runs/quickstart --out runs/quickstart/hf")
def export(
    source: Annotated[Path, typer.Argument(help="A run folder, or one checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    dtype: Annotated[str, typer.Option(help="float32 (the master weights) or bfloat16.")] = "float32",
    max_shard_size: Annotated[int, typer.Option(help="Most megabytes of one safetensors file.")] = 5000,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder, if not the recipe's.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="For an instruction-tuned model: generation ends at <|im_end|>.")
    ] = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder for transformers, vLLM and SGLang."""
    from checkpoints.export import export as write

    if max_shard_size < 1:
        raise UserError(f"--max-shard-size is {max_shard_size}: it must be at least 1 (megabyte)")
    megabytes = max_shard_size * 10**6
    written = write(source, out, dtype=dtype, max_shard_bytes=megabytes, tokenizer=tokenizer, chat=chat)
    print(f"{out}: written" if written else f"{out}: this checkpoint has been exported already")


@app.command(epilog="Example: moonlight verify runs/quickstart runs/quickstart/hf")
def verify(
    source: Annotated[Path, typer.Argument(help="A run folder, or one checkpoint.")],
    folder: Annotated[Path, typer.Argument(help="The exported Hugging Face folder.")],
) -> None:
    """Compare a checkpoint with an exported folder: every tensor, then logits and routes. Exits 1 on a difference."""
    from checkpoints.verify import print_report
    from checkpoints.verify import verify as compare

    report = compare(source, folder)
    print_report(report)
    if not report.passed:
        raise typer.Exit(1)


@app.command(epilog='Example: moonlight generate runs/quickstart/hf --prompt "def main("')
def generate(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 draws.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
) -> None:
    """Continue a text with an exported model, by plain transformers."""
    from eval.generate import generate as complete

    print(complete(folder, prompt, max_new_tokens, temperature=temperature, seed=seed))


@app.command(epilog="Example: moonlight quickstart --corpus ~/texts")
def quickstart(
    corpus: Annotated[
        Path | None,
        typer.Option(help="Folder or file of text; by default the sources of Python's standard library."),
    ] = None,
    recipe: Annotated[Path, typer.Option(help="Recipe to train.")] = Path("configs/quickstart.yaml"),
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
) -> None:
    """The whole road from text to a completion. Finished steps are not repeated."""
    from moonlight.quickstart import quickstart as go

    go(corpus, recipe, overrides or [])


def main() -> None:
    """Entry point of the `moonlight` command."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    code = None
    with report_errors(debug=debug):
        try:
            code = app(arguments, prog_name="moonlight", standalone_mode=False)
        except _UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
                raise SystemExit(2) from None
            place = error.ctx.command_path if error.ctx else "moonlight"
            raise UserError(f"{error.format_message().rstrip('.')}; see {place} --help") from None
    if code == CODE_INTERRUPTED and PART_OF_QUICKSTART not in os.environ:
        print("\ninterrupted: the same command goes on, training from its newest checkpoint", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
