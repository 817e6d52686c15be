"""The command `moonlight eval`."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: moonlight eval runs/quickstart/hf --suite offline --allow-code"


def evaluate(
    folders: Annotated[list[Path], typer.Argument(help="Hugging Face folders: exports, or any causal language model.")],
    suite: Annotated[
        str, typer.Option(help="paper (its eleven benchmarks), offline (small, self-made) or heldout (bits per byte).")
    ] = "offline",
    tasks: Annotated[str, typer.Option(help="Only these of the suite, with commas: mmlu,gsm8k.")] = "",
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of data sets, each in OWNER/NAME, for a machine without a network.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="For heldout: a folder of `moonlight data prepare`. Repeatable.")
    ] = None,
    backend: Annotated[str, typer.Option(help="transformers or vllm.")] = "transformers",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto: the folder's on a GPU, else float32.")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(help="Sequences in one pass, with transformers.")] = 8,
    sequence_length: Annotated[
        int | None, typer.Option(help="For heldout: tokens of a window; by default as in training, else the context.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first items of each task, to try things out.")] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Execute code that the model writes, in a sandbox.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; by default evaluation/SUITE beside the first model.")
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="Put the table into the model card of each export.")] = False,
) -> None:
    """Measure models as others measure theirs: JSON, a table beside published scores, a curve over checkpoints."""
    from eval.evaluate import Options
    from eval.evaluate import evaluate as measure

    if card:
        from checkpoints.card_evaluation import check_card, fill_card

        for folder in folders:
            check_card(folder)
    options = Options(
        suite=suite,
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
        data_dir=data_dir,
        data=tuple(data or ()),
        backend=backend,
        dtype=dtype,
        batch_size=batch_size,
        limit=limit,
        allow_code=allow_code,
        sequence_length=sequence_length,
    )
    found = measure(folders, options, out)
    print(f"\n{found.table}")
    print(f"{found.out}: results.json, table.md{', curve.png' if found.curve else ''}, answers of each model")
    if card:
        for folder in folders:
            fill_card(folder, suite, found.table, found.curve)
            print(f"{folder / 'README.md'}: the table was put in")
