"""Fixtures shared by the tests."""

import shutil
import sysconfig
from pathlib import Path

import pytest
from pool import Pool


@pytest.fixture(scope="session")
def pool():
    workers = Pool()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory):
    """About 400 kB in 13 text files: library sources, tab-indented text, other scripts than Latin."""
    folder = tmp_path_factory.mktemp("corpus")
    library = Path(sysconfig.get_path("stdlib"))
    names = (
        "argparse",
        "ast",
        "bisect",
        "csv",
        "dis",
        "doctest",
        "enum",
        "heapq",
        "locale",
        "queue",
        "tarfile",
    )
    for name in names:
        shutil.copy(library / f"{name}.py", folder)
    (folder / "tabs.txt").write_text("func main() {\n\tfor i := range 9 {\n\t\tprint(i)\n\t}\n}\n" * 300)
    (folder / "scripts.txt").write_text("月光照在河面上。Луна над рекой. " * 300, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(small_corpus, tmp_path_factory):
    """A tokenizer of 1024 ids trained on `small_corpus`."""
    from moonlight.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer") / "small"
    train_tokenizer([small_corpus], 1024, folder)
    return folder
