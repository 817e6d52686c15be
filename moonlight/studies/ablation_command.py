"""`moonlight ablate`: ablations run, put into tables and drawn."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from moonlight.errors import UserError
from moonlight.files import atomic_write_text
from moonlight.studies.ablation import Ablation, AblationRun, load_ablation
from moonlight.studies.ablation_picture import draw
from moonlight.studies.ablation_text import ablation_caveats, course_table, loss_table, matrices_text, verdict
from moonlight.studies.measured import read_measured
from moonlight.studies.outcome import variant_results
from moonlight.studies.results import StudyResult
from moonlight.studies.runs import run_and_report
from moonlight.studies.weights import WEIGHTS_FILE, measure_weight_rms


def ablate(paths: Sequence[Path], *, draw_only: bool, dry_run: bool) -> None:
    """Run what the ablations lack, then write the table and the picture of each.

    Args:
        draw_only: run nothing.
        dry_run: say what would run, and stop.

    Raises:
        UserError: an ablation or its results cannot be used, a run failed, or there are no results to draw.
    """
    ablations = [load_ablation(path) for path in paths]
    run_and_report(ablations, partial(_conclude, draw_only=draw_only), run_none=draw_only, dry_run=dry_run)


def _conclude(ablation: Ablation, results: Mapping[AblationRun, StudyResult[AblationRun]], *, draw_only: bool) -> None:
    """Table and picture of one ablation, into its folder and on the screen."""
    if not results:
        raise UserError(
            f"{ablation.folder_path} has no results yet: run `moonlight ablate {ablation.path}` without --draw-only"
        )
    weight_rms = (
        read_measured(ablation.folder_path / WEIGHTS_FILE) if draw_only else measure_weight_rms(ablation, results)
    )
    outcomes = variant_results(ablation, results)
    parts = [f"# {ablation.name}", "Held-out loss, nats per token:", loss_table(ablation, outcomes)]
    parts += ["\n".join(f"- {doubt}" for doubt in found)] if (found := ablation_caveats(ablation, outcomes)) else []
    parts += [said] if (said := verdict(ablation, outcomes)) else []
    if course := course_table(ablation, outcomes):
        parts += ["Training loss less the baseline's, on the same batches, over parts of the run:", course]
    parts += [text] if (text := matrices_text(outcomes, weight_rms)) else []
    parts.append("Differences are means over seeds, each against the baseline with that seed [least, largest].")
    print("\n\n".join(parts), flush=True)
    atomic_write_text(ablation.folder_path / "results.md", "\n\n".join(parts) + "\n")
    draw(ablation, outcomes, weight_rms, ablation.folder_path / "ablation.png")
    print(f"\n{ablation.folder_path}: results.json, results.md, ablation.png")
