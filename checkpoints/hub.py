"""Upload of a checked folder to the Hugging Face Hub in one commit, and a check of the result."""

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, logging

from checkpoints.export import EXPORT_FILE
from checkpoints.hf_config import CONFIG_FILE
from checkpoints.release import MAIN, Release
from moonlight.errors import UserError

_RERUN = "run the same command again: uploaded files are skipped"


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Result of an upload."""

    url: str
    sent: list[str]
    """Files that were missing on the Hub or differed."""
    removed: list[str]
    """Weight files of an earlier release that this release does not have."""


def upload(release: Release, *, private: bool) -> Upload:
    """Upload files that the Hub lacks in one commit, then compare the hash of every file.

    Missing repositories are created, as is the branch of an intermediate checkpoint. The token comes from HF_TOKEN or
    the file that `hf auth login` writes, the address of the Hub from HF_ENDPOINT.

    Args:
        private: create a new repository as private, and refuse a public one.

    Raises:
        UserError: no token exists, the repository cannot be used, the Hub refuses, fails or is unreachable, or files
            differ after the upload.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    logging.set_verbosity_error()  # its warnings at each retry contain signed URLs
    token = get_token()
    if token is None:
        raise UserError("no Hugging Face token found: run `hf auth login`, or set HF_TOKEN, with write access")
    api = HfApi(token=token, library_name="moonlight-stack")
    with _hub_errors(api.endpoint, release.repo, token):
        api.create_repo(release.repo, private=private or None, exist_ok=True)
        if private and not api.model_info(release.repo).private:
            raise UserError(f"repository {release.repo} is public: make it private on the Hub, or leave out --private")
        if release.revision != MAIN:
            api.create_branch(release.repo, branch=release.revision, exist_ok=True)
        remote_files = _list_files(api, release)
        if CONFIG_FILE in remote_files and EXPORT_FILE not in remote_files:
            raise UserError(
                f"repository {release.repo}, revision {release.revision}, holds another model "
                f"(it has no {EXPORT_FILE}): choose another name"
            )
        sent = _changed_files(release, remote_files)
        # Servers load every weight file in the folder.
        removed = sorted(name for name in remote_files if name.endswith(".safetensors") and name not in release.files)
        if sent or removed:
            api.create_commit(
                release.repo,
                [
                    *(CommitOperationAdd(name, str(release.folder / name)) for name in sent),
                    *(CommitOperationDelete(name, is_folder=False) for name in removed),
                ],
                commit_message=f"step {release.step}",
                revision=release.revision,
            )
            if changed := _changed_files(release, _list_files(api, release)):
                raise UserError(f"{changed[0]} on the Hub differs from the file in {release.folder}: {_RERUN}")
    page = f"{api.endpoint}/{release.repo}"
    return Upload(
        url=page if release.revision == MAIN else f"{page}/tree/{release.revision}", sent=sent, removed=removed
    )


def _list_files(api: HfApi, release: Release) -> dict[str, RepoFile]:
    tree = api.list_repo_tree(release.repo, recursive=True, revision=release.revision)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _changed_files(release: Release, stored: dict[str, RepoFile]) -> list[str]:
    """Return the files that the Hub lacks or has with different content."""
    return [name for name in sorted(release.files) if not _same(release, name, stored.get(name))]


def _same(release: Release, name: str, remote: RepoFile | None) -> bool:
    if remote is None or remote.size != release.size(name):
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == release.files[name]
    # For files that are not in LFS, the Hub reports the Git blob hash.
    content = (release.folder / name).read_bytes()
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def _hub_errors(endpoint: str, repo: str, token: str) -> Iterator[None]:
    """Convert errors of the client to a one-line UserError with advice; it never contains the token."""
    try:
        yield
    except UserError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.filename:
            raise  # a local file
        # The client wraps an error of a large file in a RuntimeError.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        # Without the cause: a traceback would print the answer of the Hub, which may contain the token.
        raise UserError(_advice(endpoint, repo, cause).replace(token, "***")) from None


def _advice(endpoint: str, repo: str, error: BaseException) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it"
    if not isinstance(error, HfHubHTTPError):
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, HTTPError):
            return f"the Hub at {endpoint} cannot be reached ({reason}): check the network; then {_RERUN}"
        without_xet = ", with HF_HUB_DISABLE_XET=1 if this Hub has no Xet storage" if "xet" in reason else ""
        return f"the upload to {endpoint}/{repo} failed ({reason}): {_RERUN}{without_xet}"
    status = error.response.status_code
    reply = " ".join((error.server_message or error.response.reason_phrase).split())[:200]
    owner = repo.split("/")[0]
    match status:
        case 401:
            todo = "the token is not valid; run `hf auth login`, or set HF_TOKEN to a token with write access"
        case 403:
            todo = f"use a token with write access to {owner}, or another owner in --repo"
        case 404:
            todo = "check the repository name, and that the token may read it"
        case 409:
            todo = "the name is taken, or another upload is in progress; choose another name, or wait and try again"
        case 429:
            todo = f"too many requests; wait a few minutes, then {_RERUN}"
        case _ if status >= 500:
            todo = f"the Hub failed; {_RERUN}"
        case _:
            todo = "the Hub does not accept this release"
    return f"the Hub at {endpoint} refuses {repo} ({status} {reply}): {todo}"
