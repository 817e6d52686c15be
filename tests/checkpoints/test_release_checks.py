"""`moonlight release` rejects a folder that fails a check with one line, before any request."""

import json
import pickle
import shutil

import pytest

from moonlight.files import SUMS_FILE, VERIFICATION_FILE, write_json, write_sums
from tests.support.exports import REPO, seal, shards


@pytest.fixture
def folder(ready_export, tmp_path):
    return shutil.copytree(ready_export, tmp_path / "hf")


def change(name, function):
    """Return an edit that applies `function` to a JSON file, then renews the checksums and the verification."""

    def edit(folder):
        content = json.loads((folder / name).read_text())
        function(content)
        write_json(folder / name, content)
        seal(folder)

    return edit


def add(name, content=b""):
    """Return an edit that adds a file to the folder and its checksums, though no export has it."""

    def edit(folder):
        (folder / name).write_bytes(content)
        seal(folder)

    return edit


def verification(**values):
    """Return an edit that sets keys of the verification file."""
    return lambda folder: write_json(
        folder / VERIFICATION_FILE, json.loads((folder / VERIFICATION_FILE).read_text()) | values
    )


def replace_with_link(folder):
    (folder / "config.json").rename(folder.parent / "elsewhere.json")
    (folder / "config.json").symlink_to(folder.parent / "elsewhere.json")
    seal(folder)


def flip_one_bit(folder):
    path = shards(folder)[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "no export.json": (lambda folder: (folder / "export.json").unlink(), ["no export.json", "moonlight export"]),
    "no origin": (change("export.json", lambda content: content.pop("made_from")), ["does not record which step"]),
    "no revision": (change("export.json", lambda content: content["made_from"].pop("revision_step")), ["which step"]),
    "odd revision": (change("export.json", lambda c: c["made_from"].update(revision_step="x/../y")), ["integers"]),
    "no sums": (lambda folder: (folder / SUMS_FILE).unlink(), ["no SHA256SUMS"]),
    "a bit flipped": (flip_one_bit, ["model-00002", "has SHA-256", "changed or is corrupt"]),
    "a shard lost": (lambda folder: shards(folder)[0].unlink(), ["lacks model-00001"]),
    "a file unlisted": (lambda folder: (folder / "new.json").touch(), ["new.json", "not listed"]),
    "not verified": (lambda folder: (folder / VERIFICATION_FILE).unlink(), ["run: moonlight verify"]),
    "failed verification": (verification(passed=False), ["records no pass", "moonlight verify"]),
    "odd verification": (verification(passed="yes"), ["records no pass"]),
    "stale verification": (lambda folder: (folder / "new.json").touch() or write_sums(folder), ["other files"]),
    "no card": (lambda folder: (folder / "README.md").unlink() or seal(folder), ["no README.md"]),
    "no licence": (add("README.md", b"---\nlicense: unknown\n---\n# Tiny\n"), ["README.md", "licen"]),
    "no front matter": (add("README.md", b"# Tiny\n"), ["README.md", "front matter"]),
    "config no JSON": (add("config.json", b"{"), ["config.json", "not a JSON object"]),
    "config of no model": (add("config.json", b"{}"), ["does not load with transformers"]),
    "generation config no JSON": (add("generation_config.json", b"[]"), ["generation_config.json", "JSON object"]),
    "tokenizer broken": (add("tokenizer.json", b"{}"), ["does not load with transformers"]),
    "code": (add("modeling.py", b"import os\n"), ["modeling.py", "code or a secret"]),
    "a pickle": (add("optimizer.pt", pickle.dumps({})), ["optimizer.pt", "code or a secret"]),
    "old weights": (add("pytorch_model.bin"), ["pytorch_model.bin", "code or a secret"]),
    "a secret": (add(".env", b"HF_TOKEN=x"), [".env", "hidden"]),
    "a key": (add("id_rsa"), ["id_rsa", "code or a secret"]),
    "a link": (replace_with_link, ["config.json", "is a link"]),
}


@pytest.mark.parametrize("edit, words", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("options", [(), ("--dry-run",)], ids=["real", "dry"])
def test_a_folder_that_fails_a_check_is_never_sent(hub, folder, refuses, edit, words, options):
    edit(folder)
    refuses(["release", folder, "--repo", REPO, *options], *words)
    assert not hub.requests


@pytest.mark.parametrize("repo", ["tiny", "moon/tiny/more", "moon/ti ny", "moon/--", ".moon/tiny", "", "moon/x.git"])
def test_invalid_repository_names(hub, folder, refuses, repo):
    refuses(["release", folder, "--repo", repo], f"--repo is {repo!r}")
    assert not hub.requests


def test_a_folder_that_does_not_exist(hub, tmp_path, refuses):
    refuses(["release", tmp_path / "none", "--repo", REPO], str(tmp_path / "none"), "moonlight export")
