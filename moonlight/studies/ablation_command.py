"""`moonlight ablate`: ablations run, put into tables and drawn."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from moonlight.errors import UserError
from moonlight.files import write_text
from moonlight.studies.ablation import Ablation, Trial, load_ablation
from moonlight.studies.ablation_picture import draw
from moonlight.studies.ablation_text import course_table, doubts, loss_table, matrices_text, verdict
from moonlight.studies.measured import read_measured
from moonlight.studies.outcome import outcomes_of
from moonlight.studies.results import Result
from moonlight.studies.runs import conclude_all
from moonlight.studies.weights import WEIGHTS_FILE, look


def ablate(paths: Sequence[Path], *, draw_only: bool, dry_run: bool) -> None:
    """Run what the ablations lack, then write the table and the picture of each.

    Args:
        draw_only: run nothing.
        dry_run: say what would run, and stop.

    Raises:
        UserError: an ablation or its results cannot be used, a run failed, or there are no results to draw.
    """
    ablations = [load_ablation(path) for path in paths]
    conclude_all(ablations, partial(_conclude, draw_only=draw_only), run_none=draw_only, dry_run=dry_run)


def _conclude(ablation: Ablation, results: Mapping[Trial, Result[Trial]], *, draw_only: bool) -> None:
    """Table and picture of one ablation, into its folder and on the screen."""
    if not results:
        raise UserError(
            f"{ablation.home} has no results yet: run `moonlight ablate {ablation.path}` without --draw-only"
        )
    weight_rms = read_measured(ablation.home / WEIGHTS_FILE) if draw_only else look(ablation, results)
    outcomes = outcomes_of(ablation, results)
    parts = [f"# {ablation.name}", "Held-out loss, nats per token:", loss_table(ablation, outcomes)]
    parts += ["\n".join(f"- {doubt}" for doubt in found)] if (found := doubts(ablation, outcomes)) else []
    parts += [said] if (said := verdict(ablation, outcomes)) else []
    if course := course_table(ablation, outcomes):
        parts += ["Training loss less the baseline's, on the same batches, over parts of the run:", course]
    parts += [text] if (text := matrices_text(outcomes, weight_rms)) else []
    parts.append("Differences are means over seeds, each against the baseline with that seed [least, largest].")
    print("\n\n".join(parts), flush=True)
    write_text(ablation.home / "results.md", "\n\n".join(parts) + "\n")
    draw(ablation, outcomes, weight_rms, ablation.home / "ablation.png")
    print(f"\n{ablation.home}: results.json, results.md, ablation.png")
