"""`moonlight report`: from run folders to a page in a file."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from moonlight.errors import UserError
from moonlight.files import atomic_write_text, check_output_file, make_folder
from moonlight.report.history import check_folder, load_history
from moonlight.report.page import build

PAGE_FILE = "report.html"
MAX_RUNS = 8
"""Runs whose colours can still be told apart."""


def report(folders: Sequence[Path], out: Path | None) -> Path:
    """Write the page about the runs of `folders` to `out`, or else into the folder of the only one.

    Returns:
        Where it was written.

    Raises:
        UserError: a folder is that of no run, no step was finished, or `out` cannot be a file.
    """
    folders, warnings = _different(folders)
    if len(folders) > MAX_RUNS:
        raise UserError(f"{len(folders)} runs were given: at most {MAX_RUNS} can be told apart in one chart")
    for folder in folders:
        check_folder(folder)
    if out is None:
        out = folders[0] / PAGE_FILE if len(folders) == 1 else Path(PAGE_FILE)
    check_output_file("--out", out, PAGE_FILE)
    histories = [load_history(folder, len(folders)) for folder in folders]
    empty = [history for history in histories if history.metrics is None]
    if len(empty) == len(histories):
        which = f"{histories[0].folder}: " if len(histories) == 1 else ""
        raise UserError(f"{which}no step was finished yet, so there is nothing to report: run it first")
    counts = Counter(history.name for history in histories)
    for history in histories:
        if counts[history.name] > 1:
            history.name = str(history.folder)
        if history.metrics is None:
            history.warnings.append(f"{history.folder}: no step was finished yet, so it has no charts")
    histories[0].warnings[:0] = warnings
    make_folder(out.parent)
    for history in histories:
        for warning in history.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    atomic_write_text(out, build(histories))
    return out


def _different(folders: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Each folder once, and what is said of those given twice."""
    found: dict[Path, Path] = {}
    warnings = []
    for folder in folders:
        if folder.resolve() in found:
            warnings.append(f"{folder} was given twice, and is shown once")
        found.setdefault(folder.resolve(), folder)
    return list(found.values()), warnings
