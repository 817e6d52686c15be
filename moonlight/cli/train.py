"""Commands that train a run, plan it or report on it: quickstart, pretrain, sft, report, settings, plan."""

from pathlib import Path
from typing import Annotated

import typer

from moonlight.cli.options import Overrides, command_group
from moonlight.errors import UserError

app = command_group()

Recipe = Annotated[Path, typer.Argument(help="YAML recipe.")]
Force = Annotated[bool, typer.Option("--force", help="Resume a run whose settings differ.")]


@app.command(epilog="Example: moonlight quickstart --corpus ~/texts")
def quickstart(
    corpus: Annotated[
        Path | None, typer.Option(help="Folder or file of text; default: the sources of Python's standard library.")
    ] = None,
    recipe: Annotated[Path, typer.Option(help="Recipe to train.")] = Path("configs/quickstart.yaml"),
    overrides: Overrides = None,
) -> None:
    """Run the whole pipeline, from text to a completion. Finished steps are skipped."""
    from moonlight.cli.quickstart import quickstart

    quickstart(corpus, recipe, overrides or [])


@app.command("quickstart-chat", epilog="Example: moonlight quickstart-chat name=adamw optimizer.name=adamw")
def quickstart_chat(
    base: Annotated[Path, typer.Option(help="Run folder of the quickstart.")] = Path("runs/quickstart"),
    recipe: Annotated[Path, typer.Option(help="Recipe to tune with.")] = Path("configs/sft/quickstart.yaml"),
    overrides: Overrides = None,
) -> None:
    """Tune the quickstart's model on simple tasks, and measure exact match before and after."""
    if not base.is_dir():
        raise UserError(f"{base} does not exist: run `make quickstart`, which trains the model to tune")
    from moonlight.cli.quickstart_chat import quickstart_chat

    quickstart_chat(base, recipe, overrides or [])


@app.command(epilog="Example: moonlight pretrain configs/quickstart.yaml train.seed=7 name=seed7")
def pretrain(recipe: Recipe, overrides: Overrides = None, force: Force = False) -> None:
    """Train, or resume a run. Starts the recipe's local processes unless torchrun did."""
    from pretrain.command import train_command

    train_command(recipe, overrides or [], force=force, conversations=False)


@app.command(epilog="Example: moonlight sft configs/sft/quickstart.yaml name=again train.seed=7")
def sft(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe with data.conversations and train.initial_checkpoint.")],
    overrides: Overrides = None,
    force: Force = False,
) -> None:
    """Tune a checkpoint on conversations, or resume a run. Otherwise the same as `moonlight pretrain`."""
    from pretrain.command import train_command

    train_command(recipe, overrides or [], force=force, conversations=True)


@app.command(epilog="Example: moonlight report runs/quickstart runs/adamw --out compared.html")
def report(
    runs: Annotated[list[Path], typer.Argument(help="A run folder, or several to compare.")],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; default: report.html in the run's folder, or in this one for several runs."),
    ] = None,
) -> None:
    """Write one HTML page about a run, or about several compared: plots, events, recipe. It needs no network."""
    from moonlight.report.write import report

    print(f"{report(runs, out)}: written")


@app.command(epilog="Example: moonlight settings train")
def settings(
    section: Annotated[str, typer.Argument(help="Section, such as train; default: all sections.")] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/settings.md.")] = False,
) -> None:
    """List every key of a recipe with type, default, unit and meaning."""
    from moonlight.cli.settings import print_settings

    print_settings(section, markdown=markdown)


@app.command(epilog="Example: moonlight plan configs/moonlight_16b_a3b/pretrain.yaml --gpus 64 --gpu h200")
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="Processes; default: the recipe's parallel.num_processes.")] = None,
    gpu: Annotated[str, typer.Option(help="h100, h800, h200, a100 or b200.")] = "h100",
    gpu_memory: Annotated[float | None, typer.Option(help="Memory of a GPU in GB; default: that of --gpu.")] = None,
    efficiency: Annotated[float, typer.Option(help="Fraction of peak FLOP/s that arithmetic reaches.")] = 0.35,
    storage_gb_per_second: Annotated[float, typer.Option(help="Write rate of checkpoints, for the whole job.")] = 2.0,
    parameters: Annotated[
        bool, typer.Option("--parameters", help="List every parameter: its rule, its matrices, its owner ranks.")
    ] = False,
    suggest: Annotated[bool, typer.Option("--suggest", help="Search the layouts that fit, fastest first.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print numbers by name instead of tables.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Also count one rank of the real model and optimizer, and compare.")
    ] = False,
    rank: Annotated[int | None, typer.Option(help="Rank of the dry run; default: 0.")] = None,
) -> None:
    """Estimate memory, network bytes and step time of a recipe on N GPUs. Exits 1 if a dry run differs."""
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
