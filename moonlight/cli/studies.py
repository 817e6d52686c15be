"""Commands that compare many runs: `moonlight scaling` and `moonlight ablate`."""

from pathlib import Path
from typing import Annotated

import typer

from moonlight.cli.options import command_group

app = command_group()

DryRun = Annotated[bool, typer.Option("--dry-run", help="List the runs to train, and stop.")]


@app.command(epilog="Example: moonlight scaling configs/scaling/cpu_dense.yaml")
def scaling(
    ladders: Annotated[list[Path], typer.Argument(help="One ladder of configs/scaling/, or several.")],
    fit_only: Annotated[bool, typer.Option("--fit-only", help="Skip training; fit existing results.")] = False,
    dry_run: DryRun = False,
    out: Annotated[
        Path | None, typer.Option(help="Plot of all ladders; default for several: runs/scaling/scaling.png.")
    ] = None,
) -> None:
    """Train a ladder of sizes with Muon and AdamW, fit scaling laws, and report the FLOPs that Muon needs.

    Writes results, tables and plots to runs/scaling/NAME/, and resumes where it was interrupted. A ladder for two cores
    takes an hour and a half.
    """
    from moonlight.studies import scaling_command

    scaling_command.scaling(ladders, fit_only=fit_only, dry_run=dry_run, out=out)


@app.command(epilog="Example: moonlight ablate configs/ablations/*.yaml")
def ablate(
    ablations: Annotated[list[Path], typer.Argument(help="One ablation of configs/ablations/, or several.")],
    draw_only: Annotated[bool, typer.Option("--draw-only", help="Skip training; redo tables and plots.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Train variants of a recipe and compare each with a baseline: loss, weights, updates.

    Writes results, tables and plots to runs/ablations/NAME/, and resumes where it was interrupted. All five take about
    an hour on two cores.
    """
    from moonlight.studies import ablation_command

    ablation_command.ablate(ablations, draw_only=draw_only, dry_run=dry_run)
