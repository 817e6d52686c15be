"""`moonlight ablate`: run ablations, write their tables and draw their plots."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from moonlight.errors import UserError
from moonlight.files import atomic_write_text
from moonlight.studies.ablation import Ablation, AblationRun, load_ablation
from moonlight.studies.ablation_picture import draw_ablation
from moonlight.studies.ablation_text import ablation_caveats, course_table, loss_table, matrices_text, verdict
from moonlight.studies.measured import read_measured
from moonlight.studies.outcome import variant_results
from moonlight.studies.results import StudyResult
from moonlight.studies.runs import run_and_report
from moonlight.studies.weights import WEIGHTS_FILE, measure_weight_rms


def ablate(paths: Sequence[Path], *, draw_only: bool, dry_run: bool) -> None:
    """Train the pending runs of the ablations, then write the tables and the plot of each.

    Args:
        draw_only: skip training and use existing results.
        dry_run: print the pending runs only.

    Raises:
        UserError: an ablation or its results are invalid, a run failed, or there are no results to draw.
    """
    ablations = [load_ablation(path) for path in paths]
    run_and_report(ablations, partial(_conclude, draw_only=draw_only), run_none=draw_only, dry_run=dry_run)


def _conclude(ablation: Ablation, results: Mapping[AblationRun, StudyResult[AblationRun]], *, draw_only: bool) -> None:
    """Print the tables of one ablation, and write tables and plot to its folder."""
    if not results:
        raise UserError(
            f"{ablation.folder_path} has no results yet: run `moonlight ablate {ablation.path}` without --draw-only"
        )
    weight_rms = (
        read_measured(ablation.folder_path / WEIGHTS_FILE) if draw_only else measure_weight_rms(ablation, results)
    )
    outcomes = variant_results(ablation, results)
    parts = [f"# {ablation.name}", "Held-out loss, nats per token:", loss_table(ablation, outcomes)]
    caveats = ablation_caveats(ablation, outcomes)
    parts += ["\n".join(f"- {caveat}" for caveat in caveats)] if caveats else []
    parts += [verdict_text] if (verdict_text := verdict(ablation, outcomes)) else []
    if course := course_table(ablation, outcomes):
        parts += ["Training loss minus the baseline's, on the same batches, over parts of the run:", course]
    parts += [text] if (text := matrices_text(outcomes, weight_rms)) else []
    parts.append("Differences are means over seeds, each against the baseline with the same seed [smallest, largest].")
    print("\n\n".join(parts), flush=True)
    atomic_write_text(ablation.folder_path / "results.md", "\n\n".join(parts) + "\n")
    draw_ablation(ablation, outcomes, weight_rms, ablation.folder_path / "ablation.png")
    print(f"\n{ablation.folder_path}: results.json, results.md, ablation.png")
