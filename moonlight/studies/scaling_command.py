"""`moonlight scaling`: train scaling ladders, fit their laws, write their tables and draw their plots."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from moonlight.errors import UserError
from moonlight.files import atomic_write_text, check_output_file
from moonlight.studies.fit import Comparison, SizeLosses, compare
from moonlight.studies.ladder import Ladder, LadderRun, load_ladder, losses_at
from moonlight.studies.measured import read_measured
from moonlight.studies.results import StudyResult, losses
from moonlight.studies.runs import run_and_report
from moonlight.studies.scaling_picture import draw_entropies, draw_grid, draw_laws
from moonlight.studies.scaling_text import best_losses, grid_table, ladder_caveats, laws_text
from moonlight.studies.spectra import SPECTRA_FILE, measure_entropies, pair_entropies, spectra_text


def scaling(paths: Sequence[Path], *, fit_only: bool, dry_run: bool, out: Path | None) -> None:
    """Train the pending runs of the ladders, then fit and plot each ladder, and plot all of them in one figure.

    Args:
        fit_only: skip training and fit existing results.
        dry_run: print the pending runs only.
        out: path of the common figure; by default scaling.png in the parent folder, for several ladders.

    Raises:
        UserError: a ladder or its results are invalid, a run failed, or there are too few results for a fit.
    """
    if out:
        check_output_file("--out", out, "scaling.png")
    ladders = [load_ladder(path) for path in paths]
    fitted = run_and_report(ladders, partial(_conclude, fit_only=fit_only), run_none=fit_only, dry_run=dry_run)
    if len(fitted) > 1 or (fitted and out):
        figure = out or Path(ladders[0].folder) / "scaling.png"
        draw_laws(fitted, figure)
        print(f"wrote {figure}")


def _conclude(
    ladder: Ladder, results: Mapping[LadderRun, StudyResult[LadderRun]], *, fit_only: bool
) -> tuple[dict[str, dict[str, SizeLosses]], Comparison]:
    """Print the tables and laws of one ladder, and write tables, laws and plots to its folder."""
    if not results:
        raise UserError(
            f"{ladder.folder_path} has no results yet: run `moonlight scaling {ladder.path}` without --fit-only"
        )
    parts = [f"# {ladder.name}", "Held-out loss, nats per token:", grid_table(ladder, results)]
    spectra = measure_entropies(ladder, results) if not fit_only else read_measured(ladder.folder_path / SPECTRA_FILE)
    caveats = ladder_caveats(ladder, results)
    parts += ["\n".join(f"- {caveat}" for caveat in caveats)] if caveats else []
    draw_grid(
        {size: losses_at(ladder, size, losses(results)) for size in ladder.sizes}, ladder.folder_path / "rates.png"
    )
    if pairs := pair_entropies(ladder, results, spectra):
        parts.append(spectra_text(pairs))
        draw_entropies(pairs, ladder.folder_path / "svd_entropy.png")
    print("\n\n".join(parts), flush=True)
    size_losses = best_losses(ladder, results)
    comparison = compare(size_losses)
    parts.append(laws_text(comparison))
    if caveats:
        parts[-1] += f"\n\nThese results are preliminary: see the {len(caveats)} caveats below the table of losses."
    print("\n" + parts[-1])
    atomic_write_text(ladder.folder_path / "results.md", "\n\n".join(parts) + "\n")
    draw_laws({ladder.name: (size_losses, comparison)}, ladder.folder_path / "scaling.png")
    entropies = ", svd_entropy.png" if pairs else ""
    print(f"{ladder.folder_path}: results.json, results.md, scaling.png, rates.png{entropies}")
    return size_losses, comparison
