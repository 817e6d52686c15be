"""Commands that use an exported model: `moonlight generate` and `moonlight eval`."""

from pathlib import Path
from typing import Annotated

import typer

from moonlight.cli.options import command_group

app = command_group()


@app.command(epilog='Example: moonlight generate runs/quickstart/hf --prompt "def main(" --temperature 0.6')
def generate(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue; with --chat, the user's message.")],
    chat: Annotated[bool, typer.Option("--chat", help="Ask a chat model; print only its answer.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: take the most likely token; above 0: sample.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Sampling seed.")] = 0,
) -> None:
    """Continue a text with an exported model, or ask a chat model, with plain transformers."""
    from eval.generate import generate

    print(generate(folder, prompt, max_new_tokens, chat=chat, temperature=temperature, seed=seed))


@app.command("eval", epilog="Example: moonlight eval runs/quickstart/hf --suite offline --allow-code")
def evaluate(
    folders: Annotated[list[Path], typer.Argument(help="Hugging Face folders: exports, or any causal language model.")],
    suite: Annotated[
        str, typer.Option(help="paper (its eleven benchmarks), offline (small, ours) or heldout (bits per byte).")
    ] = "offline",
    tasks: Annotated[str, typer.Option(help="Run only these tasks of the suite, for example mmlu,gsm8k.")] = "",
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of data sets as OWNER/NAME, for machines without network.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="For heldout: folder of `moonlight data prepare`. Repeatable.")
    ] = None,
    backend: Annotated[str, typer.Option(help="transformers or vllm.")] = "transformers",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto: the folder's on a GPU, float32 on a CPU.")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass, with transformers.")] = 8,
    sequence_length: Annotated[
        int | None, typer.Option(help="For heldout: tokens per window; default: as in training, or the context.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Run only the first N items of each task, for a trial.")] = None,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Execute model-written code in a sandbox.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; default: evaluation/SUITE next to the first model.")
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="Add the table to the model card of each export.")] = False,
) -> None:
    """Evaluate models on standard benchmarks. Writes JSON, a table with published scores, a curve over checkpoints."""
    from eval.evaluate import EvalOptions, evaluate

    if card:
        from checkpoints.card_evaluation import check_card, fill_card

        for folder in folders:
            check_card(folder)
    options = EvalOptions(
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
    output = evaluate(folders, options, out)
    print(f"\n{output.table}")
    print(f"{output.out}: results.json, table.md{', curve.png' if output.curve else ''}, answers of each model")
    if card:
        for folder in folders:
            fill_card(folder, suite, output.table, output.curve)
            print(f"{folder / 'README.md'}: table added")
