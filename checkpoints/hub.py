"""Sending a checked folder to the Hugging Face Hub as one commit, and seeing that it arrived."""

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
from checkpoints.release import MAIN, Release
from moonlight.errors import UserError

_AGAIN = "run the same command again: what has arrived is not sent again"


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What an upload did."""

    url: str
    sent: list[str]
    """Files that were new or differed; the others were there already."""
    removed: list[str]
    """Weight files of an earlier release that this one does not have."""


def upload(release: Release, *, private: bool) -> Upload:
    """Send what the Hub does not have yet in one commit, then compare every file there by its hash.

    The repository and, for a checkpoint on the way, its branch are made if they are missing. The token comes from
    HF_TOKEN or the file that `hf auth login` writes, the Hub's address from HF_ENDPOINT.

    Args:
        private: makes a new repository private, and refuses one that is public.

    Raises:
        UserError: no token, a repository that cannot be used, a Hub that refuses, fails or is out of reach, or
            files that differ there afterwards.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    logging.set_verbosity_error()  # its warnings at every new attempt quote signed addresses
    token = get_token()
    if token is None:
        raise UserError("there is no Hugging Face token: run `hf auth login`, or set HF_TOKEN, with write access")
    api = HfApi(token=token, library_name="moonlight-stack")
    with _errors_of_the_hub(api.endpoint, release.repo, token):
        _prepare(api, release, private=private)
        there = _listing(api, release)
        if "config.json" in there and EXPORT_FILE not in there:
            raise UserError(
                f"repository {release.repo}, revision {release.revision}, holds another model "
                f"(it has no {EXPORT_FILE}): choose another name"
            )
        sent = _different(release, there)
        # Servers load every weight file that they find.
        removed = sorted(name for name in there if name.endswith(".safetensors") and name not in release.files)
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
            if wrong := _different(release, _listing(api, release)):
                raise UserError(f"{wrong[0]} is not on the Hub as it is in {release.folder}: {_AGAIN}")
    page = f"{api.endpoint}/{release.repo}"
    return Upload(
        url=page if release.revision == MAIN else f"{page}/tree/{release.revision}", sent=sent, removed=removed
    )


def _prepare(api: HfApi, release: Release, *, private: bool) -> None:
    """Make the repository and the branch if they are missing."""
    api.create_repo(release.repo, private=private or None, exist_ok=True)
    if private and not api.model_info(release.repo).private:
        raise UserError(f"repository {release.repo} is public: make it private on the Hub, or leave out --private")
    if release.revision != MAIN:
        api.create_branch(release.repo, branch=release.revision, exist_ok=True)


def _listing(api: HfApi, release: Release) -> dict[str, RepoFile]:
    tree = api.list_repo_tree(release.repo, recursive=True, revision=release.revision)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _different(release: Release, stored: dict[str, RepoFile]) -> list[str]:
    """Files that the Hub lacks or has with another content."""
    return [name for name in sorted(release.files) if not _same(release, name, stored.get(name))]


def _same(release: Release, name: str, remote: RepoFile | None) -> bool:
    if remote is None or remote.size != release.size(name):
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == release.files[name]
    # Of other files the Hub gives Git's own hash.
    content = (release.folder / name).read_bytes()
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def _errors_of_the_hub(endpoint: str, repo: str, token: str) -> Iterator[None]:
    """Turn what the client raises into one line that says what to do and never holds the token."""
    try:
        yield
    except UserError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.filename:
            raise  # a file of ours
        # The client wraps what happens to one large file in a RuntimeError.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        # Without the cause: a traceback would print what the Hub said as it is.
        raise UserError(_advice(endpoint, repo, cause).replace(token, "***")) from None


def _advice(endpoint: str, repo: str, error: BaseException) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be sent: unset it"
    if not isinstance(error, HfHubHTTPError):
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, HTTPError):
            return f"the Hub at {endpoint} cannot be reached ({reason}): check the network; then {_AGAIN}"
        without_xet = ", with HF_HUB_DISABLE_XET=1 if this Hub has no Xet storage" if "xet" in reason else ""
        return f"the upload to {endpoint}/{repo} failed ({reason}): {_AGAIN}{without_xet}"
    status = error.response.status_code
    said = " ".join((error.server_message or error.response.reason_phrase).split())[:200]
    owner = repo.split("/")[0]
    match status:
        case 401:
            todo = "the token is not valid there; run `hf auth login`, or set HF_TOKEN to a token with write access"
        case 403:
            todo = f"use a token with write access to {owner}, or another owner in --repo"
        case 404:
            todo = "check its name, and that the token may see it"
        case 409:
            todo = "the name is taken, or another upload is under way; choose another name, or wait and try again"
        case 429:
            todo = f"too many requests; wait some minutes, then {_AGAIN}"
        case _ if status >= 500:
            todo = f"the Hub has a failure; {_AGAIN}"
        case _:
            todo = "the Hub does not accept this release"
    return f"the Hub at {endpoint} refuses {repo} ({status} {said}): {todo}"
