"""The commands of `moonlight bench`."""

import signal
from pathlib import Path
from typing import Annotated

import typer

from moonlight.cli.options import command_group
from moonlight.errors import CODE_STOPPED
from moonlight.files import check_output_file

bench_app = command_group("Run benchmarks against other implementations.")


def _check_writable(path: Path | None) -> Path | None:
    """Raise UserError, before the benchmark runs, if the file cannot be written."""
    if path is not None:
        check_output_file("--json", path, "figures.json")
    return path


def _exit_stopped(*_: object) -> None:
    raise SystemExit(CODE_STOPPED)


def _exit_unless(passed: bool | None) -> None:
    """Exit 1 if a command returned False."""
    if passed is False:
        raise typer.Exit(1)


Rounds = Annotated[int, typer.Option(min=1, help="Rounds; each round runs every case.")]
Layers = Annotated[int, typer.Option(min=2, help="Number of layers (overrides the recipe).")]
Recipe = Annotated[Path, typer.Option(help="Recipe of the model.")]
Json = Annotated[Path | None, typer.Option(help="Also write the results to this JSON file.", callback=_check_writable)]


@bench_app.callback(result_callback=_exit_unless)
def bench() -> None:
    signal.signal(signal.SIGTERM, _exit_stopped)  # raise an exception, so that temporary folders are removed


@bench_app.command("train-step", epilog="Example: moonlight bench train-step --rounds 5 --json train-step.json")
def bench_train_step(
    rounds: Rounds = 5,
    model: Annotated[list[str], typer.Option(help="quickstart or 0.1b. Repeatable.")] = ["quickstart"],  # noqa: B006
    optimizer: Annotated[str, typer.Option(help="Our optimizer: muon or adamw. The peer uses AdamW.")] = "muon",
    json: Json = None,
) -> bool:
    """Compare a training step with transformers' DeepseekV3. Exits 1 if a result misses its gate or bar."""
    from moonlight.bench import train_step

    return train_step.bench_train_step(rounds, model, optimizer, json)


@bench_app.command("profile", epilog="Example: moonlight bench profile configs/quickstart.yaml train.dtype=bfloat16")
def bench_profile(
    recipe: Annotated[Path, typer.Argument(help="Recipe to run in one process.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value of the recipe.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Profiled steps, after warm-up steps.")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    json: Json = None,
) -> None:
    """Profile a training step: time by part of the model."""
    from moonlight.bench import profile

    profile.bench_profile(recipe, overrides or [], steps, threads, json)


@bench_app.command("optimizer", epilog="Example: moonlight bench optimizer --rounds 9 --json optimizer.json")
def bench_optimizer(
    rounds: Rounds = 7, device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu", json: Json = None
) -> bool:
    """Compare Muon's accuracy and speed with other Muon implementations. Exits 1 if a result misses its gate or bar."""
    from moonlight.bench import optimizer

    return optimizer.bench_optimizer(rounds, device, json)


@bench_app.command("export", epilog="Example: moonlight bench export --rounds 3 --json export.json")
def bench_export(
    rounds: Rounds = 3,
    layers: Layers = 4,
    recipe: Recipe = Path("configs/moonlight_16b_a3b/pretrain.yaml"),
    json: Json = None,
) -> bool:
    """Compare CPU time and memory of export and import with save_pretrained. Exits 1 if a result misses its bar."""
    from moonlight.bench import export

    return export.bench_export(rounds, layers, recipe, json)


@bench_app.command("loader", epilog="Example: moonlight bench loader --rounds 7 --json loader.json")
def bench_loader(
    rounds: Rounds = 7,
    tokens: Annotated[
        int, typer.Option(min=1_000_000, help="Tokens in each of three sources; 4 bytes per token on disk.")
    ] = 50_000_000,
    json: Json = None,
) -> bool:
    """Compare tokens per second on one core with Megatron's GPTDataset. Exits 1 if a result misses its gate or bar."""
    from moonlight.bench import loader

    return loader.bench_loader(rounds, tokens, json)


@bench_app.command("monitors", epilog="Example: moonlight bench monitors --rounds 5 --json monitors.json")
def bench_monitors(rounds: Rounds = 5, json: Json = None) -> bool:
    """Measure the cost of monitors at their default interval, as a fraction of a step. Exits 1 if it misses its bar."""
    from moonlight.bench import monitors

    return monitors.bench_monitors(rounds, json)


@bench_app.command("checkpoint", epilog="Example: moonlight bench checkpoint --rounds 5 --json checkpoint.json")
def bench_checkpoint(
    rounds: Rounds = 5,
    layers: Layers = 3,
    recipe: Recipe = Path("configs/moonlight_family/a0.1b.yaml"),
    json: Json = None,
) -> bool:
    """Measure how long a save blocks training, and its write speed. Exits 1 if a result misses its bar."""
    from moonlight.bench import checkpoint

    return checkpoint.bench_checkpoint(rounds, layers, recipe, json)


@bench_app.command("startup", epilog="Example: moonlight bench startup --rounds 5 --json startup.json")
def bench_startup(
    rounds: Rounds = 5,
    recipe: Annotated[Path, typer.Option(help="Recipe of the run.")] = Path("configs/quickstart.yaml"),
    json: Json = None,
) -> bool:
    """Measure the time until --help prints, and until the first step of a run. Exits 1 if a result misses its bar."""
    from moonlight.bench import startup

    return startup.bench_startup(rounds, recipe, json)


@bench_app.command("picture", epilog="Example: moonlight bench picture --figures docs/benchmarks --out benchmarks.png")
def bench_picture(
    figures: Annotated[Path, typer.Option(help="Folder of <name>-<date>.json files from --json.")] = Path(
        "docs/benchmarks"
    ),
    out: Annotated[Path, typer.Option(help="Image to write.")] = Path("docs/images/benchmarks.png"),
) -> None:
    """Plot the newest results of every benchmark, with spread and bar."""
    from moonlight.bench import picture

    for path in picture.plot_results(figures, out):
        print(f"read {path}")
    print(f"{out}: written")


@bench_app.command("tokenizer", epilog="Example: moonlight bench tokenizer --rounds 3 --json tokenizer.json")
def bench_tokenizer(
    rounds: Rounds = 3,
    megabytes: Annotated[int, typer.Option(min=1, help="Megabytes of text to encode.")] = 20,
    json: Json = None,
) -> bool:
    """Compare encoding speed with sentencepiece and transformers. Exits 1 if a result misses its gate or bar."""
    from moonlight.bench import tokenizer

    return tokenizer.bench_tokenizer(rounds, megabytes, json)
