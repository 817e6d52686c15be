"""The `moonlight` command. Every command imports what it needs when it runs, so that --help is instant."""

import os
import sys
from pathlib import Path
from typing import Annotated, cast

import typer

from moonlight.cli.bench import bench_app
from moonlight.cli.chat import add_commands
from moonlight.cli.evaluate import EXAMPLE as EVAL_EXAMPLE
from moonlight.cli.evaluate import evaluate
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
app.add_typer(bench_app, name="bench")

_UsageError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])
"""What the command line raises for arguments it cannot use; Typer exports no name for it."""

PART_OF_QUICKSTART = "MOONLIGHT_PART_OF_QUICKSTART"
"""Set for the commands that quickstart runs: it speaks for them when it is interrupted."""

_AFTER_INTERRUPT = {
    "ablate": "the same command goes on: runs that have ended are kept, the others go on from their checkpoints",
    "eval": "the same command goes on with the benchmarks that are not finished",
    "pretrain": "the same command goes on from the newest checkpoint, or begins again if there is none yet",
    "sft": "the same command goes on from the newest checkpoint, or begins again if there is none yet",
    "quickstart": "the same command goes on, training from its newest checkpoint if there is one",
    "quickstart-chat": "the same command goes on, tuning from its newest checkpoint if there is one",
    "scaling": "the same command goes on: runs that have ended are kept, the others go on from their checkpoints",
    "release": "the same command goes on, and sends what is missing",
}
_NOTHING_LEFT = "nothing unfinished is left behind; the same command begins again"
"""What is said when Ctrl-C ends a command."""

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
    from moonlight.data.tokenizer_train import train_tokenizer

    train_tokenizer(input, vocab_size, out, text_field=text_field, threads=os.cpu_count() or 1)
    print(f"{out}: {vocab_size:,} ids")


@data_app.command("prepare", epilog="Example: moonlight data prepare --input corpus/ --tokenizer tok --out data")
def data_prepare(
    input: Inputs,
    tokenizer: Annotated[Path, typer.Option(help="Folder of `moonlight tokenizer train`, or of a Hugging Face model.")],
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


@app.command(epilog="Example: moonlight pretrain configs/quickstart.yaml train.seed=7 name=seed7")
def pretrain(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value; moonlight/config/run.py has all keys.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Go on with a run of other settings.")] = False,
) -> None:
    """Train, or go on where the run stopped. Starts the recipe's local processes unless torchrun did."""
    from pretrain.command import train_command

    train_command(recipe, overrides or [], force=force, conversations=False)


@app.command(epilog="Example: moonlight scaling configs/scaling/cpu_dense.yaml")
def scaling(
    ladders: Annotated[list[Path], typer.Argument(help="One ladder of configs/scaling/, or several.")],
    fit_only: Annotated[bool, typer.Option("--fit-only", help="Train nothing: fit what there is.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be trained, and stop.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Figure of all ladders; by default runs/scaling/scaling.png for several.")
    ] = None,
) -> None:
    """Train a ladder of sizes with Muon and AdamW, fit the scaling laws, and say how many of the FLOPs Muon needs.

    Writes results, tables and pictures into runs/scaling/NAME/, and goes on where it was interrupted. A ladder for two
    cores takes an hour and a half.
    """
    from moonlight.studies.scaling_command import scaling as climb

    climb(ladders, fit_only=fit_only, dry_run=dry_run, out=out)


@app.command(epilog="Example: moonlight ablate configs/ablations/*.yaml")
def ablate(
    ablations: Annotated[list[Path], typer.Argument(help="One ablation of configs/ablations/, or several.")],
    draw_only: Annotated[bool, typer.Option("--draw-only", help="Train nothing: tables and pictures again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be trained, and stop.")] = False,
) -> None:
    """Train variants of a recipe side by side, and compare each with a baseline: loss, weights, updates.

    Writes results, tables and pictures into runs/ablations/NAME/, and goes on where it was interrupted. All five take
    about an hour on two cores.
    """
    from moonlight.studies.ablation_command import ablate as compare

    compare(ablations, draw_only=draw_only, dry_run=dry_run)


@app.command(epilog="Example: moonlight plan configs/moonlight_16b_a3b/pretrain.yaml --gpus 64 --gpu h200")
def plan(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value; moonlight/config/run.py has all keys.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="Processes; by default the recipe's parallel.num_processes.")] = None,
    gpu: Annotated[str, typer.Option(help="h100, h800, h200, a100 or b200.")] = "h100",
    gpu_memory: Annotated[float | None, typer.Option(help="Memory of a GPU in GB, if not that kind's.")] = None,
    efficiency: Annotated[float, typer.Option(help="Share of peak FLOP/s that arithmetic reaches.")] = 0.35,
    storage_gb_per_second: Annotated[float, typer.Option(help="Rate of checkpoints, for the whole job.")] = 2.0,
    parameters: Annotated[
        bool, typer.Option("--parameters", help="List every parameter: its rule, its matrices, who owns it.")
    ] = False,
    suggest: Annotated[bool, typer.Option("--suggest", help="Search the layouts that fit, fastest first.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print numbers by name instead of tables.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count one rank of the real model and optimizer besides, and compare.")
    ] = False,
    rank: Annotated[int | None, typer.Option(help="Rank of the dry run; by default 0.")] = None,
) -> None:
    """Memory, bytes on the wire and seconds of a recipe on N GPUs, from formulas. Exits 1 if a dry run differs."""
    from moonlight.plan.command import PlanOptions, run_plan

    options = PlanOptions(
        gpus=gpus,
        gpu=gpu,
        gpu_memory_gb=gpu_memory,
        efficiency=efficiency,
        storage_gb_per_second=storage_gb_per_second,
        parameters=parameters,
        suggest=suggest,
        json=json,
        dry_run=dry_run,
        rank=rank,
    )
    if not run_plan(recipe, overrides or [], options):
        raise typer.Exit(1)


@app.command(epilog="Example: moonlight export runs/quickstart --out hf --dtype bfloat16 --license apache-2.0")
def export(
    source: Annotated[Path, typer.Argument(help="A run folder, or one checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    dtype: Annotated[str, typer.Option(help="float32 (the master weights) or bfloat16.")] = "float32",
    max_shard_size: Annotated[int, typer.Option(help="Most megabytes of one safetensors file.")] = 5000,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder, if not the checkpoint's.")] = None,
    revision_step: Annotated[
        int | None,
        typer.Option(help="Take the checkpoint after this step, to be released as the revision step-N."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="For an instruction-tuned model: generation ends at <|im_end|>.")
    ] = False,
    untie: Annotated[
        bool, typer.Option("--untie", help="Write tied embeddings a second time as the head, which vLLM needs.")
    ] = False,
    license: Annotated[str | None, typer.Option(help="Licence of the model, such as apache-2.0.")] = None,
    repo: Annotated[str | None, typer.Option(help="Its name on the Hub (owner/name), for the card's examples.")] = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder for transformers, vLLM and SGLang."""
    from checkpoints.export import export as write

    if max_shard_size < 1:
        raise UserError(f"--max-shard-size is {max_shard_size}: it must be at least 1 (megabyte)")
    written = write(
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
    print(f"{out}: written" if written else f"{out}: this checkpoint has been exported already")


@app.command("import", epilog="Example: moonlight import Moonlight-16B-A3B --out checkpoints/moonlight")
def import_(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face folder of the DeepSeek-V3 architecture.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")],
) -> None:
    """Make a checkpoint of a Hugging Face folder, for training to start from under any layout. No code of it is run."""
    from checkpoints.hf_import import import_folder

    if import_folder(folder, out):
        print(f"{out}: written; {out / 'recipe.yaml'} begins a recipe that trains on from it")
    else:
        print(f"{out}: this folder has been imported already")


@app.command(epilog="Example: moonlight average runs/quickstart --last 2 --out runs/quickstart-average")
def average(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    last: Annotated[int, typer.Option(help="How many of the newest checkpoints.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")],
) -> None:
    """Make a checkpoint whose weights are the mean of a run's newest ones, to be exported."""
    from checkpoints.average import average as mean_of

    if steps := mean_of(run, last, out):
        print(f"{out}: the mean of the checkpoints after steps {', '.join(map(str, steps))}")
    else:
        print(f"{out}: this mean has been made already")


@app.command(epilog="Example: moonlight verify runs/quickstart runs/quickstart/hf")
def verify(
    source: Annotated[Path, typer.Argument(help="A run folder, or one checkpoint.")],
    folder: Annotated[Path, typer.Argument(help="The Hugging Face folder that it was exported to or imported from.")],
    tensors_only: Annotated[
        bool, typer.Option("--tensors-only", help="Leave the logits out, for a model larger than memory.")
    ] = False,
) -> None:
    """Compare a checkpoint with a Hugging Face folder: tensors, then logits and routes. Exits 1 on a difference."""
    from checkpoints.verify import print_report
    from checkpoints.verify import verify as compare

    report = compare(source, folder, tensors_only=tensors_only)
    print_report(report)
    if not report.passed:
        raise typer.Exit(1)


@app.command(epilog="Example: moonlight release runs/mine/hf --repo my-name/my-model --dry-run")
def release(
    folder: Annotated[Path, typer.Argument(help="The exported and verified Hugging Face folder.")],
    repo: Annotated[str, typer.Option(help="Repository on the Hugging Face Hub, as owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private if it is new.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list what would go, without network.")] = False,
) -> None:
    """Check an exported folder and send it to the Hugging Face Hub. A second run sends only what is missing."""
    from checkpoints.release import check, print_plan

    checked = check(folder, repo)
    if dry_run:
        print_plan(checked, private=private)
        print("dry run: nothing was sent")
        return
    from checkpoints.hub import upload

    done = upload(checked, private=private)
    for name in done.removed:
        print(f"{name}: removed there, it is no part of this release")
    if done.sent:
        print(f"{len(done.sent)} of {len(checked.files)} files sent, all {len(checked.files)} compared with the Hub's")
    elif not done.removed:
        print("everything is there already")
    print(done.url)


@app.command(epilog='Example: moonlight generate runs/quickstart/hf --prompt "def main(" --temperature 0.6')
def generate(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue; with --chat, what a user says.")],
    chat: Annotated[bool, typer.Option("--chat", help="Ask a chat model: the answer to the prompt alone.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 draws.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
) -> None:
    """Continue a text with an exported model, or ask a chat model, by plain transformers."""
    from eval.generate import generate as complete

    print(complete(folder, prompt, max_new_tokens, chat=chat, temperature=temperature, seed=seed))


app.command("eval", epilog=EVAL_EXAMPLE)(evaluate)


@app.command(epilog="Example: moonlight report runs/quickstart runs/adamw --out compared.html")
def report(
    runs: Annotated[list[Path], typer.Argument(help="One run folder, or several to compare.")],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; by default report.html in the run's folder, or here for several."),
    ] = None,
) -> None:
    """Write one page about a run, or several compared: charts, what happened, recipe. It needs no network."""
    from moonlight.report.write import report as write

    print(f"{write(runs, out)}: written")


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
    from moonlight.cli.quickstart import quickstart as go

    go(corpus, recipe, overrides or [])


add_commands(app, data_app)


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
        print(f"\ninterrupted: {_AFTER_INTERRUPT.get(arguments[0], _NOTHING_LEFT)}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
