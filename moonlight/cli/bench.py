"""The commands of `moonlight bench`."""

import signal
from pathlib import Path
from typing import Annotated

import typer

from moonlight.errors import CODE_STOPPED
from moonlight.files import check_output_file

bench_app = typer.Typer(help="Measure against other implementations.", no_args_is_help=True, rich_markup_mode=None)


def _can_be_written(path: Path | None) -> Path | None:
    if path is not None:
        check_output_file("--json", path, "figures.json")
    return path


def _end(*_: object) -> None:
    raise SystemExit(CODE_STOPPED)


Rounds = Annotated[int, typer.Option(min=1, help="Rounds in which the cases take turns.")]
Json = Annotated[Path | None, typer.Option(help="File to write the figures to as well.", callback=_can_be_written)]


@bench_app.callback()
def bench() -> None:
    """Measure against other implementations."""
    signal.signal(signal.SIGTERM, _end)  # an exception, so that temporary folders are removed


@bench_app.command("train-step", epilog="Example: moonlight bench train-step --rounds 5 --json train-step.json")
def bench_train_step(
    rounds: Rounds = 5,
    model: Annotated[list[str], typer.Option(help="quickstart or 0.1b; may be given more than once.")] = ["quickstart"],  # noqa: B006
    optimizer: Annotated[str, typer.Option(help="Ours: muon or adamw. The peer has AdamW.")] = "muon",
    json: Json = None,
) -> None:
    """A whole training step beside transformers' DeepseekV3. Exits 1 if a figure misses its gate or bar."""
    from moonlight.bench.train_step import bench_train_step as measure

    if not measure(rounds, model, optimizer, json):
        raise typer.Exit(1)


@bench_app.command("profile", epilog="Example: moonlight bench profile configs/quickstart.yaml train.dtype=bfloat16")
def bench_profile(
    recipe: Annotated[Path, typer.Argument(help="Recipe of the run, which one process takes steps of.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the recipe.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps under the profiler, after some that warm up.")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a processor.")] = 1,
    json: Json = None,
) -> None:
    """Where the time of a training step goes."""
    from moonlight.bench.profile import bench_profile as measure

    measure(recipe, overrides or [], steps, threads, json)


@bench_app.command("optimizer", epilog="Example: moonlight bench optimizer --rounds 9 --json optimizer.json")
def bench_optimizer(
    rounds: Rounds = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Json = None,
) -> None:
    """Muon's accuracy, then its speed against other Muons. Exits 1 if a figure misses its gate or bar."""
    from moonlight.bench.optimizer import bench_optimizer as measure

    if not measure(rounds, device, json):
        raise typer.Exit(1)


@bench_app.command("export", epilog="Example: moonlight bench export --rounds 3 --json export.json")
def bench_export(
    rounds: Rounds = 3,
    layers: Annotated[int, typer.Option(min=2, help="Layers of the model, which else is the recipe's.")] = 4,
    recipe: Annotated[Path, typer.Option(help="Recipe of the model.")] = Path(
        "configs/moonlight_16b_a3b/pretrain.yaml"
    ),
    json: Json = None,
) -> None:
    """CPU time and memory of export and import beside save_pretrained. Exits 1 if a figure misses its bar."""
    from moonlight.bench.export import bench_export as measure

    if not measure(rounds, layers, recipe, json):
        raise typer.Exit(1)


@bench_app.command("loader", epilog="Example: moonlight bench loader --rounds 7 --json loader.json")
def bench_loader(
    rounds: Rounds = 7,
    tokens: Annotated[
        int, typer.Option(min=1_000_000, help="Tokens of each of three sources, 4 bytes each on disk.")
    ] = 50_000_000,
    json: Json = None,
) -> None:
    """Tokens per second of one core beside Megatron's GPTDataset. Exits 1 if a figure misses its gate or bar."""
    from moonlight.bench.loader import bench_loader as measure

    if not measure(rounds, tokens, json):
        raise typer.Exit(1)


@bench_app.command("monitors", epilog="Example: moonlight bench monitors --rounds 5 --json monitors.json")
def bench_monitors(
    rounds: Rounds = 5,
    json: Json = None,
) -> None:
    """What monitors cost at their default cadence, as a share of a step. Exits 1 if a figure misses its bar."""
    from moonlight.bench.monitors import bench_monitors as measure

    if not measure(rounds, json):
        raise typer.Exit(1)


@bench_app.command("checkpoint", epilog="Example: moonlight bench checkpoint --rounds 5 --json checkpoint.json")
def bench_checkpoint(
    rounds: Rounds = 5,
    layers: Annotated[int, typer.Option(min=2, help="Layers of the model, which else is the recipe's.")] = 3,
    recipe: Annotated[Path, typer.Option(help="Recipe of the model.")] = Path("configs/moonlight_family/a0.1b.yaml"),
    json: Json = None,
) -> None:
    """How long a save stops training, and how fast it writes. Exits 1 if a figure misses its bar."""
    from moonlight.bench.checkpoint import bench_checkpoint as measure

    if not measure(rounds, layers, recipe, json):
        raise typer.Exit(1)


@bench_app.command("startup", epilog="Example: moonlight bench startup --rounds 5 --json startup.json")
def bench_startup(
    rounds: Rounds = 5,
    recipe: Annotated[Path, typer.Option(help="Recipe of the run.")] = Path("configs/quickstart.yaml"),
    json: Json = None,
) -> None:
    """Seconds until a command answers, and until the first step of a run. Exits 1 if a figure misses its bar."""
    from moonlight.bench.startup import bench_startup as measure

    if not measure(rounds, recipe, json):
        raise typer.Exit(1)


@bench_app.command("picture", epilog="Example: moonlight bench picture --figures docs/benchmarks --out benchmarks.png")
def bench_picture(
    figures: Annotated[Path, typer.Option(help="Folder of <name>-<date>.json, as --json writes them.")] = Path(
        "docs/benchmarks"
    ),
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("docs/images/benchmarks.png"),
) -> None:
    """Draw the newest figures of every benchmark, each with its spread and its bar."""
    from moonlight.bench.picture import plot_results

    for path in plot_results(figures, out):
        print(f"from {path}")
    print(f"{out}: written")


@bench_app.command("tokenizer", epilog="Example: moonlight bench tokenizer --rounds 3 --json tokenizer.json")
def bench_tokenizer(
    rounds: Rounds = 3,
    megabytes: Annotated[int, typer.Option(min=1, help="Text to encode.")] = 20,
    json: Json = None,
) -> None:
    """Text to ids beside sentencepiece and transformers. Exits 1 if a figure misses its gate or bar."""
    from moonlight.bench.tokenizer import bench_tokenizer as measure

    if not measure(rounds, megabytes, json):
        raise typer.Exit(1)
