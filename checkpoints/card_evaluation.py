"""Results of an evaluation in the model card of an export, its checksums kept true."""

import json
import re
import shutil
from pathlib import Path

from checkpoints.export import EXPORT_FILE
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

CARD_FILE = "README.md"
HEADING = "### Evaluation"
_AFTER = "## Limitations"
"""The section that follows results in every card of ours."""
_SUITE = re.compile(r"<!-- suite ([\w-]+) -->\n(.*?)<!-- end -->\n", re.DOTALL)


def check_card(folder: Path) -> None:
    """Raise UserError unless `folder` is an export of ours with a card that results can be put into."""
    if not (folder / EXPORT_FILE).is_file() or not (folder / SUMS_FILE).is_file():
        raise UserError(f"{folder} is no export of `moonlight export`: --card has no model card to fill there")
    card = folder / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if f"\n{_AFTER}\n" not in text:
        raise UserError(f"{card} has no line {_AFTER!r}, which results go before: export again, or put it in")
    if read_sums(folder / SUMS_FILE).get(CARD_FILE) != sha256_checksum(card):
        raise UserError(f"{card} was changed since its line in {SUMS_FILE} was written: export again")


def fill_card(folder: Path, suite: str, markdown: str, picture: Path | None) -> None:
    """Put the table of a suite, and its curve, into the card of an export, in place of an earlier one of that suite.

    `SHA256SUMS` gets new lines for what changed. The proof of `moonlight verify` is about tensors and configuration,
    which stay: if it was valid for the sums before, it is made valid for the new ones.

    Raises:
        UserError: `check_card` refuses the folder.
    """
    check_card(folder)
    sums_file, proof_file = folder / SUMS_FILE, folder / VERIFICATION_FILE
    sums, before = read_sums(sums_file), sha256_checksum(sums_file)
    proof = json.loads(proof_file.read_text(encoding="utf-8")) if proof_file.is_file() else None
    changed = {CARD_FILE}
    if picture is not None:
        name = f"evaluation-{suite}.png"
        shutil.copyfile(picture, folder / name)
        markdown += f"\n![Scores over tokens]({name})\n"
        changed.add(name)
    card = folder / CARD_FILE
    atomic_write_text(card, with_evaluation(card.read_text(encoding="utf-8"), suite, markdown))
    write_sums(folder, {name: digest for name, digest in sums.items() if name not in changed})
    if proof is not None and proof.get("sums_sha256") == before:
        write_json(proof_file, proof | {"sums_sha256": sha256_checksum(sums_file)})


def with_evaluation(card: str, suite: str, markdown: str) -> str:
    """The card with the results of one suite, those of other suites kept."""
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
