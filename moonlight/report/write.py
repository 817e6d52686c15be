"""`moonlight report`: write the page about run folders to a file."""

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
"""Maximum number of runs whose colors are easy to distinguish."""


def report(folders: Sequence[Path], out: Path | None) -> Path:
    """Write the page about the runs of `folders`.

    Args:
        out: file to write; by default report.html in the folder of a single run, otherwise in the current folder.

    Returns:
        The path of the page.

    Raises:
        UserError: a folder is not the folder of a run, no run finished a step, or `out` cannot be written.
    """
    folders, warnings = _deduplicate(folders)
    if len(folders) > MAX_RUNS:
        raise UserError(f"runs is {len(folders)} folders: a page shows at most {MAX_RUNS}. Give fewer")
    for folder in folders:
        check_folder(folder)
    if out is None:
        out = folders[0] / PAGE_FILE if len(folders) == 1 else Path(PAGE_FILE)
    check_output_file("--out", out, PAGE_FILE)
    histories = [load_history(folder, len(folders)) for folder in folders]
    without_steps = [history for history in histories if history.metrics is None]
    if len(without_steps) == len(histories):
        prefix = f"{histories[0].folder}: " if len(histories) == 1 else ""
        raise UserError(f"{prefix}no step finished yet: train the run before the report")
    counts = Counter(history.name for history in histories)
    for history in histories:
        if counts[history.name] > 1:
            history.name = str(history.folder)
        if history.metrics is None:
            history.warnings.append(f"{history.folder}: no step finished yet, so it has no charts")
    histories[0].warnings[:0] = warnings
    make_folder(out.parent)
    for history in histories:
        for warning in history.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    atomic_write_text(out, build(histories))
    return out


def _deduplicate(folders: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return each folder once, and a warning for each repeated one."""
    unique: dict[Path, Path] = {}
    warnings = []
    for folder in folders:
        if folder.resolve() in unique:
            warnings.append(f"{folder} was given twice and is shown once")
        unique.setdefault(folder.resolve(), folder)
    return list(unique.values()), warnings
