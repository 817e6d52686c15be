"""Fixtures shared by the tests."""

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

import hypothesis  # noqa: F401  (imported early: after the deep-nesting tests CPython 3.11 may fail to compile it)
import pytest
import torch

from tests.support.bad_input import check_line
from tests.support.pool import Pool

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads this on import, and then runs its kernels on a CPU


@pytest.fixture
def one_thread():
    """Run torch on one thread: on a busy machine, threads that share tiny products mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def single_process():
    """Process groups of a single process."""
    from moonlight import parallel

    parallel.init_single_process()
    yield
    parallel.destroy_distributed()


@pytest.fixture(scope="session")
def pool():
    """Worker processes that all tests share."""
    workers = Pool()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory):
    """About 400 kB in 13 text files: library sources, tab-indented text, other scripts than Latin."""
    folder = tmp_path_factory.mktemp("corpus")
    library = Path(sysconfig.get_path("stdlib"))
    names = ("argparse", "ast", "bisect", "csv", "dis", "doctest", "enum", "heapq", "locale", "queue", "tarfile")
    for name in names:
        shutil.copy(library / f"{name}.py", folder)
    (folder / "tabs.txt").write_text("func main() {\n\tfor i := range 9 {\n\t\tprint(i)\n\t}\n}\n" * 300)
    (folder / "scripts.txt").write_text("月光照在河面上。Луна над рекой. " * 300, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(small_corpus, tmp_path_factory):
    """A tokenizer of 1024 ids trained on `small_corpus`."""
    from moonlight.data.tokenizer_train import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer") / "small"
    train_tokenizer([small_corpus], 1024, folder)
    return folder


@pytest.fixture(scope="session")
def tiktoken_folder(small_corpus, tmp_path_factory):
    """A tokenizer in Moonlight's published format, with 2,048 text ids."""
    from tests.support.foreign_tokenizers import write_tiktoken

    return write_tiktoken(tmp_path_factory.mktemp("tiktoken") / "small", small_corpus)


@pytest.fixture(scope="session")
def fast_folder(small_corpus, tmp_path_factory):
    """A Hugging Face fast tokenizer of another model family, with its own template, truncation and code."""
    from tests.support.foreign_tokenizers import write_fast

    return write_fast(tmp_path_factory.mktemp("fast") / "small", small_corpus)


@pytest.fixture(scope="session")
def data_folder(small_corpus, tokenizer_folder, tmp_path_factory):
    """`small_corpus` prepared, with a tenth of it held out."""
    from moonlight.data.prepare import prepare

    folder = tmp_path_factory.mktemp("data") / "small"
    prepare([small_corpus], tokenizer_folder, folder, validation_share=0.1)
    return folder


@dataclass(frozen=True)
class TinyRun:
    """A finished run of four steps on one process. It is read-only: tests that change it copy `folder`."""

    recipe: Path
    folder: Path
    """Run folder with checkpoints after steps 2 and 4."""
    data: Path
    tokenizer: Path


@pytest.fixture(scope="session")
def tiny_run(small_corpus, tokenizer_folder, tmp_path_factory):
    """A run that `moonlight pretrain` finished in a separate process."""
    from moonlight.config.load import to_yaml
    from moonlight.data.prepare import prepare
    from tests.support.layouts import recipe

    folder = tmp_path_factory.mktemp("tiny")
    prepare([small_corpus], tokenizer_folder, folder / "data", validation_share=0.1)
    config = recipe(train_steps=4, save_every_steps=2, validate_every_steps=4, threads_per_process=1)
    config = replace(
        config,
        name="tiny",
        runs_folder=str(folder / "runs"),
        model=replace(config.model, vocab_size=1024),
        data=replace(config.data, path=str(folder / "data"), tokenizer=str(tokenizer_folder)),
    )
    path = folder / "tiny.yaml"
    path.write_text(to_yaml(config))
    command = [sys.executable, "-m", "moonlight.cli", "pretrain", str(path)]
    subprocess.run(command, check=True, timeout=120, cwd=Path(__file__).parent.parent)
    return TinyRun(path, folder / "runs" / "tiny", folder / "data", tokenizer_folder)


@pytest.fixture
def refuses(tmp_path, monkeypatch, capfd):
    """Call the command in this process, and check its error line and that `tmp_path` has the same files as before."""
    from moonlight.cli.main import main

    def call(arguments, *words):
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["moonlight", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main()
        check_line(exit_info.value.code, capfd.readouterr().err, words)
        assert sorted(tmp_path.rglob("*")) == before

    return call


@pytest.fixture
def as_worker(monkeypatch):
    """Make `moonlight pretrain` train in this process, as under torchrun."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")


@pytest.fixture
def runs(tiny_run, tmp_path):
    """A copy of the tiny run that tests may corrupt, in runs/tiny."""
    shutil.copytree(tiny_run.folder, tmp_path / "runs" / "tiny")
    return tmp_path / "runs"


@pytest.fixture(scope="session")
def ready_export(tiny_run, tmp_path_factory):
    """The tiny run exported, with all files that a release needs. It is read-only."""
    from tests.support.exports import make_ready

    out = tmp_path_factory.mktemp("ready") / "hf"
    make_ready(tiny_run.folder, out)
    return out


@pytest.fixture(scope="session")
def small_models(tmp_path_factory):
    """A model in one file and the same model in shards, both without a tokenizer. Tests copy them."""
    from tests.support.hugging_face import make_folder

    folder = tmp_path_factory.mktemp("models")
    make_folder(folder / "single", num_hidden_layers=2)
    make_folder(folder / "sharded", max_shard_size="100KB", num_hidden_layers=2)
    return folder


@pytest.fixture
def single_file(small_models, tmp_path):
    """A copy of the one-file model that tests may corrupt, in hf."""
    return Path(shutil.copytree(small_models / "single", tmp_path / "hf"))


@pytest.fixture
def import_refused(refuses, tmp_path):
    """Call `moonlight import` on a folder, and check its error as `refuses` does."""
    return lambda folder, *words: refuses(["import", folder, "--out", tmp_path / "checkpoint"], *words)


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """An empty Hub that the client in this process uses instead of the real one."""
    import huggingface_hub.constants as constants

    from tests.support.exports import OWNER, TOKEN
    from tests.support.hub import Hub

    hub = Hub(TOKEN, OWNER)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path_factory.mktemp("home") / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.close()
    assert not hub.failures, hub.failures[0]
