"""Checksums of a folder agree with the sha256sum tool; errors name the file that differs."""

import subprocess

import pytest

from moonlight.errors import UserError
from moonlight.files import SUMS_FILE, VERIFICATION_FILE, check_sums, sha256_checksum, write_sums


@pytest.fixture
def folder(tmp_path):
    """Three files on two levels and their checksums. One name has a space and Chinese characters."""
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "deep" / "月 光.txt").write_text("月光", encoding="utf-8")
    (folder / "empty.txt").touch()
    write_sums(folder)
    return folder


def test_sha256sum_accepts_the_sums(folder):
    subprocess.run(["sha256sum", "--check", "--strict", SUMS_FILE], cwd=folder, check=True, capture_output=True)
    sums = check_sums(folder)
    assert sums == {name: sha256_checksum(folder / name) for name in ("config.json", "deep/月 光.txt", "empty.txt")}


def test_the_output_of_sha256sum_is_accepted(folder):
    expected = check_sums(folder)
    out = subprocess.run(["sha256sum", *expected], cwd=folder, check=True, capture_output=True).stdout
    (folder / SUMS_FILE).write_bytes(out)
    assert check_sums(folder) == expected


def test_rewriting_changes_nothing_and_leaves_verification_out(folder):
    before = (folder / SUMS_FILE).read_bytes()
    (folder / VERIFICATION_FILE).write_text("{}")
    write_sums(folder)
    assert (folder / SUMS_FILE).read_bytes() == before
    assert VERIFICATION_FILE not in check_sums(folder)


def test_error_names_a_changed_file(folder):
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json has SHA-256 4f53cda18c2b"):
        check_sums(folder)


def test_error_names_a_missing_file(folder):
    (folder / "empty.txt").unlink()
    with pytest.raises(UserError, match=r"lacks empty\.txt"):
        check_sums(folder)


def test_error_names_an_unlisted_file(folder):
    (folder / "deep" / "new.txt").touch()
    with pytest.raises(UserError, match=r"deep/new\.txt is not listed"):
        check_sums(folder)


@pytest.mark.parametrize(
    "line",
    [
        f"{'0' * 64}  ../secret",
        f"{'0' * 64}  deep/../../secret",
        f"{'0' * 64}  /etc/passwd",
        f"{'0' * 64}  ./config.json",
        f"{'0' * 64}  deep//x",
        f"{'0' * 64}  ..",
        f"{'0' * 64} config.json",
        f"{'0' * 63}  config.json",
        "nonsense",
        "",
    ],
)
def test_invalid_lines_are_refused(folder, line):
    with (folder / SUMS_FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match="SHA256SUMS, line 4"):
        check_sums(folder)


def test_a_name_listed_twice_is_refused(folder):
    sums = folder / SUMS_FILE
    sums.write_text(sums.read_text() * 2)
    with pytest.raises(UserError, match=r"line 4 .* second time"):
        check_sums(folder)


def test_a_missing_sums_file(folder):
    (folder / SUMS_FILE).unlink()
    with pytest.raises(UserError, match="has no SHA256SUMS"):
        check_sums(folder)
