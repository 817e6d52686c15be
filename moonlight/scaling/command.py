"""`moonlight scaling`: ladders trained, fitted, printed and drawn."""

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from moonlight.errors import UserError
from moonlight.files import folder_lock, write_text
from moonlight.flops import count_parameters
from moonlight.scaling.fit import Cell, Comparison, compare
from moonlight.scaling.ladder import Ladder, Point, flops_of, load_ladder, losses_at, train_flops, wanted
from moonlight.scaling.picture import draw_grid, draw_laws
from moonlight.scaling.results import Result, losses, read_results
from moonlight.scaling.spectra import compare_spectra, look, read_spectra
from moonlight.scaling.text import cells_of, doubts, grid_table, laws_text
from moonlight.timeline import Timeline


def scaling(paths: Sequence[Path], *, fit_only: bool, dry_run: bool, out: Path | None) -> None:
    """Run what the ladders lack, then fit and draw each, and all on one figure.

    Args:
        fit_only: run nothing.
        dry_run: say what would run, and stop.
        out: the common figure; by default scaling.png beside the folders of several ladders.

    Raises:
        UserError: a ladder or its results cannot be used, a run failed, or there are too few results for a fit.
    """
    ladders = [load_ladder(path) for path in paths]
    names = Counter(ladder.home for ladder in ladders)
    if twice := [str(home) for home, count in names.items() if count > 1]:
        raise UserError(f"two ladders have the folder {twice[0]}: give them different names")
    known = [read_results(ladder) for ladder in ladders]
    if dry_run:
        for ladder, results in zip(ladders, known, strict=True):
            print(plan_text(ladder, results))
        return
    if not fit_only and (needing := [ladder for ladder in ladders if ladder.needs_gpu]):
        import torch

        if not torch.cuda.is_available():
            raise UserError(f"ladder {needing[0].path} needs a GPU, and this machine has none: leave it out")
    fitted: dict[str, tuple[Mapping[str, Mapping[str, Cell]], Comparison]] = {}
    for ladder in ladders:
        with folder_lock(ladder.home) if not fit_only else contextlib.nullcontext():
            results = read_results(ladder)  # under the lock: nobody else changes them
            if not fit_only:
                from moonlight.scaling.train import prepare_data, train_ladder

                prepare_data(ladder)
                print(plan_text(ladder, results), flush=True)
                train_ladder(ladder, results)
            fitted[ladder.name] = _conclude(ladder, results, fit_only=fit_only)
    if len(fitted) > 1 or out:
        figure = out or Path(ladders[0].folder) / "scaling.png"
        draw_laws(fitted, figure)
        print(f"{figure}: written")


def plan_text(ladder: Ladder, results: Mapping[Point, Result]) -> str:
    """Sizes, tokens and FLOPs of a ladder, and what is still to be done."""
    lines = [f"{ladder.name}: {len(results)} runs done", "", "| size | parameters | activated, with head | tokens |"]
    lines[-1] += " steps | FLOPs of a run |"
    lines.append("|---|---|---|---|---|---|")
    for size in ladder.sizes:
        run = ladder.run(ladder.first_point(size))
        counts, timeline = count_parameters(run.model), Timeline(run)
        tokens = timeline.num_sequences * run.data.sequence_length
        lines.append(
            f"| {size} | {counts.total:,} | {counts.activated_with_head:,} | {tokens:,} | {timeline.num_steps:,} | "
            f"{train_flops(run):.3g} |"
        )
    missing = wanted(ladder, losses(results))
    flops = flops_of(ladder, missing)
    lines += ["", f"at least {len(missing)} runs are to be done, {flops:.3g} FLOPs"] if missing else ["", "all done"]
    return "\n".join([*lines, ""])


def _conclude(
    ladder: Ladder, results: Mapping[Point, Result], *, fit_only: bool
) -> tuple[dict[str, dict[str, Cell]], Comparison]:
    """Table, laws and pictures of one ladder, into its folder and on the screen."""
    if not results:
        raise UserError(f"{ladder.home} has no results yet: run `moonlight scaling {ladder.path}` without --fit-only")
    parts = [f"# {ladder.name}", "Held-out loss, nats per token:", grid_table(ladder, results)]
    spectra = look(ladder, results) if not fit_only else read_spectra(ladder)
    parts += ["\n".join(f"- {doubt}" for doubt in found)] if (found := doubts(ladder, results)) else []
    draw_grid({size: losses_at(ladder, size, losses(results)) for size in ladder.sizes}, ladder.home / "rates.png")
    parts += [text] if (text := compare_spectra(ladder, results, spectra)) else []
    print("\n\n".join(parts), flush=True)
    cells = cells_of(ladder, results)
    comparison = compare(cells)
    parts.append(laws_text(comparison))
    print("\n" + parts[-1])
    write_text(ladder.home / "results.md", "\n\n".join(parts) + "\n")
    draw_laws({ladder.name: (cells, comparison)}, ladder.home / "scaling.png")
    print(f"{ladder.home}: results.json, results.md, scaling.png, rates.png")
    return cells, comparison
