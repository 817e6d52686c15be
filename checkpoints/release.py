"""Checks of an exported folder before its release, and the list of files to upload."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from checkpoints.card import missing_card_parts
from checkpoints.export import CARD_FILE, EXPORT_FILE
from checkpoints.hf_config import CONFIG_FILE
from checkpoints.hf_folder import GENERATION_FILE, read_json_strict
from moonlight.errors import UserError
from moonlight.files import SUMS_FILE, VERIFICATION_FILE, check_sums, sha256_checksum

MAIN = "main"

_SUFFIXES = (".safetensors", ".json", ".jinja", ".md", ".model", ".txt", ".png")
_NAMES = (SUMS_FILE, "LICENSE")
"""File names of an export. Any other file could be code, a pickle or a secret, and is refused."""

_LFS_SUFFIXES = (".safetensors", ".model", ".png")
_LFS_BYTES = 10 * 10**6
"""The Hub stores files with these suffixes, and larger files, in Git LFS by default; the Hub decides."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """A checked folder and its destination."""

    folder: Path
    repo: str
    """owner/name on the Hub."""
    revision: str
    """Branch: main, or step-N for an intermediate checkpoint."""
    step: int
    files: dict[str, str]
    """SHA-256 of every file, by name relative to `folder`."""

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        return (self.folder / name).stat().st_size


def check_release(folder: Path, repo: str) -> Release:
    """Check an exported folder and the name of its repository, offline.

    Raises:
        UserError: `repo` is not owner/name; `folder` is not a Moonlight export, has a file that exports do not have,
            did not pass `moonlight verify`, differs from its checksums, has an incomplete model card, or transformers
            cannot load its configuration or tokenizer.
    """
    _check_repo(repo)
    step, revision = _origin(folder)
    _check_names(folder)
    _check_verified(folder)
    _check_card(folder / CARD_FILE)
    files = check_sums(folder)
    _check_loads(folder)
    files |= {name: sha256_checksum(folder / name) for name in (SUMS_FILE, VERIFICATION_FILE)}
    return Release(folder=folder, repo=repo, revision=revision, step=step, files=files)


def print_release(release: Release, *, private: bool) -> None:
    """Print the files to upload."""
    table = Table(title=f"Release of {release.folder}", title_justify="left")
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right")
    table.add_column("storage")
    for name in sorted(release.files):
        size = release.size(name)
        lfs = name.endswith(_LFS_SUFFIXES) or size > _LFS_BYTES
        table.add_row(name, decimal(size), "LFS" if lfs else "regular")
    table.add_section()
    table.add_row(f"{len(release.files)} files", decimal(sum(map(release.size, release.files))), "")
    console = Console(highlight=False)
    console.print(table)
    visibility = " (private)" if private else ""
    console.print(f"repository {release.repo}{visibility}, revision {release.revision}", soft_wrap=True)


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--repo is {repo!r}: {error}") from None
    if "/" not in repo:
        raise UserError(f"--repo is {repo!r}: it must be owner/name, such as my-name/{repo}")


def _origin(folder: Path) -> tuple[int, str]:
    """Return the step of the exported checkpoint, and the branch of the release."""
    if not (folder / EXPORT_FILE).is_file():
        raise UserError(f"{folder} has no {EXPORT_FILE}: create the folder with `moonlight export`")
    made_from = read_json_strict(folder / EXPORT_FILE).get("made_from")
    if not isinstance(made_from, dict) or not {"step", "revision_step"} <= made_from.keys():
        raise UserError(
            f"{folder / EXPORT_FILE} does not record which step was exported: export it again with `moonlight export`"
        )
    step, revision_step = made_from["step"], made_from["revision_step"]
    if not isinstance(step, int) or not isinstance(revision_step, int | None):
        raise UserError(
            f"{folder / EXPORT_FILE} has step {step!r} and revision_step {revision_step!r}: they must be integers"
        )
    return step, MAIN if revision_step is None else f"step-{revision_step}"


def _check_names(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise UserError(f"{path} is a link: a release has only files; remove it")
        if path.name.startswith("."):
            raise UserError(f"{path} is hidden: it could contain a secret; remove it")
        if path.is_file() and path.suffix not in _SUFFIXES and name not in _NAMES:
            raise UserError(
                f"{path} is not a file of an export: it could be code or a secret; remove it "
                f"(accepted are {', '.join((*_SUFFIXES, *_NAMES))})"
            )


def _check_verified(folder: Path) -> None:
    hint = f"run: moonlight verify CHECKPOINT {folder}"
    if not (folder / VERIFICATION_FILE).exists():
        raise UserError(f"{folder} has no {VERIFICATION_FILE}: it was not verified; {hint}")
    report = read_json_strict(folder / VERIFICATION_FILE)
    if report.get("passed") is not True:
        raise UserError(f"{folder / VERIFICATION_FILE} records no pass: the export differs from its source; {hint}")
    sums = folder / SUMS_FILE
    if not sums.is_file():
        raise UserError(f"{folder} has no {SUMS_FILE}: export it again with `moonlight export`")
    if report.get("sums_sha256") != sha256_checksum(sums):
        raise UserError(f"{folder / VERIFICATION_FILE} is for other files than {sums} lists; {hint}")


def _check_card(path: Path) -> None:
    try:
        missing = missing_card_parts(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}, the model card: export it again") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8: export it again with `moonlight export`") from None
    if missing:
        lacking = ", ".join(missing)
        raise UserError(f"the model card {path} lacks {lacking}: export again with options that give it")


def _check_loads(folder: Path) -> None:
    """Load configurations and tokenizer with transformers, from these files alone."""
    for name in (CONFIG_FILE, GENERATION_FILE):
        read_json_strict(folder / name)
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        GenerationConfig.from_pretrained(folder, local_files_only=True)
        AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many exception types for an unreadable folder
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} does not load with transformers without remote code ({reason}): export it again"
        ) from error
