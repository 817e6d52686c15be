"""`moonlight release`: the real Hub client against a local test Hub over HTTP."""

import os
import shutil
import socket
import sys
import time

import huggingface_hub.constants
import pytest

from moonlight.cli.main import main
from moonlight.files import SUMS_FILE, VERIFICATION_FILE, sha256_checksum
from tests.support.bad_input import check_line, command, run_command
from tests.support.exports import CARD, REPO, TOKEN, seal, set_revision_step, shards
from tests.support.hub import JUST_MADE, LFS_SUFFIXES


@pytest.fixture
def folder(ready_export, tmp_path):
    return shutil.copytree(ready_export, tmp_path / "hf")


@pytest.fixture
def release(monkeypatch, capfd):
    """Run the command in this process and return its stdout."""

    def call(folder, *options, repo=REPO):
        monkeypatch.setattr(sys, "argv", ["moonlight", "release", str(folder), "--repo", repo, *options])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capfd.readouterr()
        assert exit_info.value.code in (0, None), captured.err
        assert captured.err == ""
        return captured.out

    return call


def environment(hub, home):
    return os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_TOKEN": TOKEN}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_byte_arrives_and_the_token_is_written_nowhere(hub, folder, tmp_path):
    before = contents(folder)
    code, out, err = run_command("release", folder, "--repo", REPO, env=environment(hub, tmp_path / "home"))
    assert (code, err) == (0, "")
    count = len(before)
    assert out.splitlines() == [
        f"{count} of {count} files uploaded, all {count} compared with the Hub's",
        f"{hub.url}/{REPO}",
    ]
    repository = hub.repositories[REPO]
    assert repository.branches == {"main": before | JUST_MADE}
    assert repository.commits == [("main", "step 4", sorted(before))]
    assert not repository.private
    assert len(shards(folder)) > 3
    assert {sha256_checksum(shard) for shard in shards(folder)} <= repository.lfs
    assert not hub.leaks
    assert contents(folder) == before
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_the_token_of_the_login_file_is_used(hub, folder, release, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with open(huggingface_hub.constants.HF_TOKEN_PATH, "w") as file:
        file.write(TOKEN)
    release(folder)
    assert REPO in hub.repositories


def test_a_second_release_uploads_nothing(hub, folder, release):
    release(folder)
    hub.requests.clear()
    assert release(folder) == f"all files are uploaded already\n{hub.url}/{REPO}\n"
    assert {method for method, _ in hub.requests} == {"GET", "POST"}
    assert not hub.count("POST", "commit") and not hub.count("POST", "lfs") and not hub.count("POST", "preupload")
    assert len(hub.repositories[REPO].commits) == 1


def test_only_changed_files_are_uploaded(hub, folder, release):
    release(folder)
    (folder / "README.md").write_text(CARD + "More about it.\n")
    seal(folder)
    hub.requests.clear()
    assert release(folder).startswith("3 of ")
    assert not hub.count("PUT", "")
    repository = hub.repositories[REPO]
    assert repository.commits[1] == ("main", "step 4", ["README.md", SUMS_FILE, VERIFICATION_FILE])
    assert repository.branches["main"] == contents(folder) | JUST_MADE


def test_an_intermediate_checkpoint_goes_to_its_own_branch(hub, folder, release, tmp_path):
    release(folder)
    main_branch = dict(hub.repositories[REPO].branches["main"])
    other = shutil.copytree(folder, tmp_path / "on_the_way")
    (other / "README.md").write_text(CARD + "Half-way.\n")
    set_revision_step(other, 2)
    seal(other)
    assert release(other).endswith(f"{hub.url}/{REPO}/tree/step-2\n")
    assert hub.repositories[REPO].branches == {"main": main_branch, "step-2": contents(other) | JUST_MADE}
    assert release(other).startswith("all files are uploaded already")


def test_the_first_release_can_be_an_intermediate_checkpoint(hub, folder, release):
    set_revision_step(folder, 2)
    seal(folder)
    release(folder, "--private")
    assert hub.repositories[REPO].branches == {"main": JUST_MADE, "step-2": contents(folder) | JUST_MADE}
    assert hub.repositories[REPO].private


def test_a_release_killed_midway_completes_on_rerun(hub, folder, release, tmp_path):
    late = sha256_checksum(shards(folder)[-1])
    hub.faults = {("PUT", late): "stall"}
    process = command("release", folder, "--repo", REPO, env=environment(hub, tmp_path / "home"))
    try:
        assert hub.stalled.wait(60)
        others = {sha256_checksum(path) for path in folder.iterdir() if path.suffix in LFS_SUFFIXES} - {late}
        deadline = time.monotonic() + 30
        while not others <= hub.objects.keys():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()
    assert late not in hub.objects
    assert hub.repositories[REPO].branches["main"] == JUST_MADE
    hub.faults, hub.requests = {}, []
    release(folder)
    assert [path for method, path in hub.requests if method == "PUT"] == [f"/storage/{late}"]
    assert hub.repositories[REPO].branches["main"] == contents(folder) | JUST_MADE


def test_a_dropped_connection_is_retried(hub, folder, release):
    first = sha256_checksum(shards(folder)[0])
    hub.faults = {("PUT", first): "drop"}
    release(folder)
    assert hub.count("PUT", first) == 2
    assert hub.repositories[REPO].branches["main"] == contents(folder) | JUST_MADE


def test_weight_files_of_an_earlier_release_are_removed(hub, folder, release):
    release(folder)
    branch = hub.repositories[REPO].branches["main"]
    branch["model-00009-of-00009.safetensors"] = b"old"
    branch["notes.md"] = b"somebody's own"
    assert "model-00009-of-00009.safetensors: removed from the Hub" in release(folder)
    assert hub.repositories[REPO].branches["main"] == contents(folder) | JUST_MADE | {"notes.md": b"somebody's own"}


def test_a_dry_run_lists_all_files_and_sends_no_request(hub, folder, release, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("COLUMNS", "120")
    set_revision_step(folder, 2)
    seal(folder)
    out = release(folder, "--dry-run")
    assert hub.requests == []
    assert all(name in out for name in contents(folder))
    assert f"{len(contents(folder))} files" in out and f"repository {REPO}" in out and "revision step-2" in out
    assert out.count("LFS") == len(shards(folder)) + 2, "tokenizer.model and loss.png are also LFS files"
    assert out.endswith("dry run: nothing was uploaded\n")


# Hub errors


def test_a_wrong_token_is_never_shown(hub, folder, tmp_path):
    """A wrong token is not printed even if the Hub echoes it and `--debug` prints a traceback."""
    wrong = "hf_wrongToken"
    environ = environment(hub, tmp_path / "home") | {"HF_TOKEN": wrong}
    code, out, err = run_command("release", folder, "--repo", REPO, "--debug", env=environ)
    assert wrong not in out + err and "Traceback" in err
    words = [hub.url, REPO, "401", "Bearer *** is unknown", "hf auth login", "HF_TOKEN"]
    check_line(code, err.splitlines(keepends=True)[-1], words)
    assert not hub.repositories


def test_no_token(hub, folder, refuses, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    refuses(["release", folder, "--repo", REPO], "no Hugging Face token", "hf auth login", "HF_TOKEN")
    assert not hub.requests


def test_the_namespace_of_another_user(hub, folder, refuses):
    refuses(["release", folder, "--repo", "sun/tiny"], "403", "sun/tiny", "write access to sun", "--repo")
    assert not hub.repositories


@pytest.mark.parametrize(
    "method, part, status, words",
    [
        ("POST", "/commit/", 500, ["told to fail", "the same command again"]),
        ("POST", "/commit/", 403, ["write access to moon"]),
        ("POST", "/commit/", 409, ["wait and try again"]),
        ("POST", "/preupload/", 404, ["check the repository name"]),
        ("PUT", "/storage/", 403, ["write access to moon"]),
        ("GET", "/tree/", 418, ["does not accept"]),
    ],
)
def test_a_failing_hub_is_one_line_and_leaves_no_commit(hub, folder, refuses, method, part, status, words):
    hub.faults = {(method, part): status}
    refuses(["release", folder, "--repo", REPO], hub.url, REPO, str(status), *words)
    assert hub.repositories[REPO].branches["main"] == JUST_MADE


def test_error_of_a_hub_without_xet_storage_names_the_setting(hub, folder, tmp_path):
    environ = environment(hub, tmp_path / "home") | {"HF_HUB_DISABLE_XET": "0"}
    code, _, err = run_command("release", folder, "--repo", REPO, env=environ)
    check_line(code, err, [hub.url, REPO, "HF_HUB_DISABLE_XET=1"])
    assert hub.repositories[REPO].branches["main"] == JUST_MADE


def test_an_unreachable_hub(hub, folder, refuses, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    refuses(["release", folder, "--repo", REPO], url, "cannot be reached", "network")


def test_offline_mode(hub, folder, refuses, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refuses(["release", folder, "--repo", REPO], "HF_HUB_OFFLINE", "unset it")
    assert not hub.requests


def test_content_changed_in_transfer_is_detected(hub, folder, refuses):
    hub.corrupt = True
    refuses(["release", folder, "--repo", REPO], "on the Hub differs from the file in", str(folder))


def test_private_is_refused_for_a_public_repository(hub, folder, release, refuses):
    set_revision_step(folder, 2)
    seal(folder)
    release(folder)
    set_revision_step(folder, None)
    seal(folder)
    refuses(["release", folder, "--repo", REPO, "--private"], REPO, "is public", "--private")
    assert hub.repositories[REPO].branches["main"] == JUST_MADE


def test_another_model_is_not_overwritten(hub, folder, release, refuses):
    release(folder)
    branch = hub.repositories[REPO].branches["main"]
    del branch["export.json"]
    branch["config.json"] = b"{}"
    refuses(["release", folder, "--repo", REPO], REPO, "another model", "another name")
    assert branch["config.json"] == b"{}"
