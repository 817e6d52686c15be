"""Evaluation results in the model card of an export, with updated checksums."""

import json
import re
import shutil
from pathlib import Path

from checkpoints.export import CARD_FILE, EXPORT_FILE
from moonlight.errors import UserError
from moonlight.files import (
    SUMS_FILE,
    VERIFICATION_FILE,
    atomic_write_text,
    read_sums,
    sha256_checksum,
    write_json,
    write_sums,
)

HEADING = "### Evaluation"
_AFTER = "## Limitations"
"""The section after the results in every card of an export."""
_SUITE = re.compile(r"<!-- suite ([\w-]+) -->\n(.*?)<!-- end -->\n", re.DOTALL)


def check_card(folder: Path) -> None:
    """Raise UserError unless `folder` is an unchanged export whose model card can take results."""
    if not (folder / EXPORT_FILE).is_file() or not (folder / SUMS_FILE).is_file():
        raise UserError(f"{folder} was not written by `moonlight export`: --card needs the model card of an export")
    card = folder / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if f"\n{_AFTER}\n" not in text:
        raise UserError(f"{card} has no line {_AFTER!r}, which follows the results: export again, or add the line")
    if read_sums(folder / SUMS_FILE).get(CARD_FILE) != sha256_checksum(card):
        raise UserError(f"{card} does not match its checksum in {SUMS_FILE}: export again")


def fill_card(folder: Path, suite: str, markdown: str, plot: Path | None) -> None:
    """Write the table and plot of a suite to the card of an export, replacing earlier results of that suite.

    `SHA256SUMS` is updated. The verification by `moonlight verify` covers tensors and configuration, which do not
    change: if it was valid for the previous checksums, it is updated to the new ones.

    Args:
        suite: name of the suite.
        markdown: table of results.
        plot: PNG to copy into the folder; None for no plot.

    Raises:
        UserError: `check_card` refuses the folder.
    """
    check_card(folder)
    sums_file, verification_file = folder / SUMS_FILE, folder / VERIFICATION_FILE
    sums, previous_digest = read_sums(sums_file), sha256_checksum(sums_file)
    verification = json.loads(verification_file.read_text(encoding="utf-8")) if verification_file.is_file() else None
    changed = {CARD_FILE}
    if plot is not None:
        name = f"evaluation-{suite}.png"
        shutil.copyfile(plot, folder / name)
        markdown += f"\n![Scores over tokens]({name})\n"
        changed.add(name)
    card = folder / CARD_FILE
    atomic_write_text(card, with_evaluation(card.read_text(encoding="utf-8"), suite, markdown))
    write_sums(folder, {name: digest for name, digest in sums.items() if name not in changed})
    if verification is not None and verification.get("sums_sha256") == previous_digest:
        write_json(verification_file, verification | {"sums_sha256": sha256_checksum(sums_file)})


def with_evaluation(card: str, suite: str, markdown: str) -> str:
    """Return the card with the results of one suite replaced or added."""
    head, _, tail = card.partition(f"\n{_AFTER}\n")
    results, _, earlier = head.partition(f"\n{HEADING}\n")
    suites = dict(_SUITE.findall(earlier))
    other = _SUITE.sub("", earlier).strip()
    suites[suite] = markdown.strip() + "\n"
    if "\n## Results\n" not in results:
        results = results.rstrip() + "\n\n## Results\n"
    parts = [results.rstrip(), HEADING, *([other] if other else [])]
    parts += [f"<!-- suite {name} -->\n{text}<!-- end -->" for name, text in suites.items()]
    return "\n\n".join(parts) + f"\n\n{_AFTER}\n{tail}"
