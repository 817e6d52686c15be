"""Bad input gives one line that names the input and the accepted values, exit code 2, and no files."""

import gzip
import json
import shutil
import subprocess
import sys

import pytest

from tests.support.bad_input import ROOT, check_line, cut, run_command

# The corpus


def empty_folder(path):
    path.mkdir()


def binary_folder(path):
    path.mkdir()
    (path / "image").write_bytes(bytes(range(256)) * 40)


CORPORA = {
    "missing": (lambda path: None, ("does not exist", ".parquet"), ("does not exist", ".parquet")),
    "empty folder": (empty_folder, ("has no files of text",), ("has no files of text",)),
    "only binary files": (binary_folder, ("has no files of text",), ("has no files of text",)),
    "empty file": (lambda path: path.write_text(""), ("no text",), ("no documents", "1 of them empty")),
    "not UTF-8": (lambda path: path.write_bytes(b"caf\xe9 " * 99), ("1 records", "UTF-8"), ("1 of 1", "not UTF-8")),
    "bad.jsonl": (lambda path: path.write_text("text\n"), ("1 records", "JSONL"), ("1 of 1", "not JSON")),
    "bad.jsonl.gz": (
        lambda path: path.write_bytes(gzip.compress(b"x" * 9999)[:-9]),
        ("1 records", "JSONL"),
        ("1 of 1", "corrupt gzip"),
    ),
    "bad.parquet": (
        lambda path: path.write_bytes(b"PAR1 and no more"),
        ("1 records", "Parquet"),
        ("1 of 1", "corrupt Parquet"),
    ),
}


@pytest.mark.parametrize("name", CORPORA)
def test_corpus(refuses, tokenizer_folder, tmp_path, name):
    make, train_words, prepare_words = CORPORA[name]
    corpus, out = tmp_path / name, tmp_path / "out"
    make(corpus)
    if prepare_words[0].startswith("1 of 1"):
        prepare_words = (*prepare_words, "max_bad_share 0.01", name)
    refuses(["tokenizer", "train", "--input", corpus, "--vocab-size", 500, "--out", out], str(corpus), *train_words)
    prepare = ["data", "prepare", "--input", corpus, "--tokenizer", tokenizer_folder, "--out", out, "--workers", 1]
    refuses(prepare, *prepare_words)


def test_corpus_without_permission(tmp_path):
    corpus = tmp_path / "closed.txt"
    corpus.write_text("text")
    corpus.chmod(0)
    code, _, err = run_command(
        *("tokenizer", "train", "--input", corpus, "--vocab-size", 500, "--out", tmp_path / "out")
    )
    check_line(code, err, [f"path '{corpus}' is not readable"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "size, words",
    [
        (1_000_000, "vocab_size is 1000000: these inputs support at most "),
        (100, "vocab_size is 100: these inputs need at least "),
        (0, "vocab_size is 0: it must be from 1"),
        (-5, "vocab_size is -5: it must be from 1"),
        (2**31, f"vocab_size is {2**31}: it must be from 1 to {2**31 - 1}"),
    ],
)
def test_vocabulary_size(refuses, small_corpus, tmp_path, size, words):
    text = small_corpus / "bisect.py"
    refuses(["tokenizer", "train", "--input", text, f"--vocab-size={size}", "--out", tmp_path / "out"], words)


def test_corpus_too_small_for_one_sequence(refuses, tiny_run, tmp_path):
    from moonlight.data.prepare import prepare

    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index in range(4):
        (corpus / f"{index}.txt").write_text(f"text {index}")
    prepare([corpus], tiny_run.tokenizer, tmp_path / "data", validation_share=0.5)
    refuses(
        ["pretrain", tiny_run.recipe, "name=other", f"data.path={tmp_path / 'data'}", f"runs_folder={tmp_path}"],
        f"data {tmp_path / 'data'} has ",
        "training tokens: too few for one sequence of data.sequence_length 32",
    )


# The recipe


@pytest.mark.parametrize(
    "overrides, words",
    [
        ("train.sed=7", "unknown recipe key train.sed: did you mean train.seed?"),
        ("trian.seed=7", "unknown recipe key trian: did you mean train?"),
        ("lr=7", "unknown recipe key lr: did you mean schedule.lr?"),
        ("zzz=7", "unknown recipe key zzz: accepted are name, runs_folder, model,"),
        ("train.seed", "override 'train.seed': write it as section.key=value"),
        ("train.seed=[", "override 'train.seed=['"),
        ("train.seed=${nope}", "'nope' not found"),
        ("train.seed=many", "train.seed is 'many': expected int"),
        ("train.seed=1.5", "train.seed is 1.5: expected int"),
        ("train.seed=true", "train.seed is True: expected int"),
        ("train.seed=null", "train.seed is None: expected int"),
        ("train.seed=-1", "train.seed is -1: it must be at least 0"),
        ("train.seed=99999999999999999999", "train.seed is 99999999999999999999: at most 2147483647"),
        ("train.train_steps=1e30", "train.train_steps is 1e+30: expected int"),
        ("train.train_steps=100000000", "train.train_steps is 100000000: at most 99999999"),
        ("train.train_steps=0", "train.train_steps is 0: it must be greater than 0"),
        ("train.stop_at_step=5", "train.stop_at_step is 5: at most train.train_steps (4)"),
        ("train=5", "train is 5: a mapping of keys is expected"),
        ("model=null", "model is None: a mapping of keys is expected"),
        ("schedule.lr=nan", "schedule.lr is nan: a finite number"),
        ("schedule.lr=.nan", "schedule.lr is nan: a finite number"),
        ("schedule.lr=inf", "schedule.lr is inf: a finite number"),
        ("schedule.lr=1e999", "schedule.lr is inf: a finite number"),
        ("schedule.lr=true", "schedule.lr is True: expected float"),
        ("schedule.lr=0", "schedule.lr is 0.0: it must be greater than 0"),
        ("schedule.min_lr=nan", "schedule.min_lr is nan: a finite number"),
        ("schedule.decay=step", "schedule.decay is 'step': accepted are 'cosine', 'linear', 'constant'"),
        ("optimizer.gradient_dtype=float16", "optimizer.gradient_dtype is 'float16': accepted are 'float32'"),
        ("optimizer.gradient_dtype=bfloat16", "optimizer.gradient_dtype is 'bfloat16': it needs train.dtype bfloat16"),
        ("optimizer.rms_matching=max", "optimizer.rms_matching is 'max': accepted are 'adjusted_lr'"),
        ("optimizer.nesterov=1", "optimizer.nesterov is 1: expected bool"),
        ("model.num_experts=true", "model.num_experts is True: expected int"),
        ("model.vocab_size=1000", "model.vocab_size is 1000: id "),
        ("data.sequence_length=65", "data.sequence_length is 65: at most model.max_position_embeddings (64)"),
        ("data.path=nowhere", "data nowhere/manifest.json: No such file or directory; make the folder with"),
        ("data.tokenizer=nowhere", "tokenizer nowhere has no tokenizer.model"),
        ("name=a/b", "name is 'a/b': it must be one folder name"),
        ("name=..", "name is '..': it must be one folder name"),
        (f"name={'n' * 300}", "File name too long; choose a shorter name"),
        ("parallel.context_parallel_size=2", "parallel.context_parallel_size is 2: only 1 is supported"),
        ("parallel.num_processes=3 parallel.tensor_parallel_size=2", "the world has 3 processes: tensor_parallel_size"),
        ("parallel.expert_parallel_size=2", "the world has 1 processes: expert_tensor_parallel_size x expert_parallel"),
        ("parallel.pipeline_parallel_size=2", "the world has 1 processes"),
        (
            "parallel.tensor_parallel_size=3",
            "model.num_attention_heads is 4: it must be a multiple of parallel.tensor_parallel_size (3)",
        ),
        (
            "parallel.expert_parallel_size=3",
            "model.num_experts is 8: it must be a multiple of parallel.expert_parallel_size (3)",
        ),
        ("parallel.num_processes=3", "train.global_batch_size is 8: it must be a multiple of train.micro_batch_size x"),
    ],
)
def test_recipe_setting(refuses, tiny_run, tmp_path, overrides, words):
    refuses(["pretrain", tiny_run.recipe, "name=other", f"runs_folder={tmp_path}", *overrides.split()], words)


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "No such file or directory; give the path of a YAML recipe"),
        ("folder", "Is a directory; give the path of a YAML recipe"),
        (b"", "recipe key name is missing"),
        (b"- a\n- b\n", "the top level must be a mapping"),
        (b"5", "give the path of a YAML recipe"),
        (b"\x80\x00\xff", "is not valid YAML"),
        (b"a:\n\tb: 1\n", "is not valid YAML"),
        (b"name: a\nname: b\n", "found duplicate key name"),
        (b"name: !!python/object/apply:os.getpid []\n", "could not determine a constructor"),
        (b"a: " + b"[" * 3000 + b"]" * 3000, "is not valid YAML"),
        (b"base: recipe.yaml\n", "its base: includes itself"),
        (b"base: nowhere.yaml\n", "nowhere.yaml: No such file or directory"),
    ],
)
def test_recipe_file(refuses, tmp_path, content, words):
    path = tmp_path / "recipe.yaml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    refuses(["pretrain", path], words)


# The tokenizer and the data


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"text"])
def test_corrupt_tokenizer(refuses, tiny_run, small_corpus, tmp_path, damage):
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_run.tokenizer, folder)
    (folder / "tokenizer.model").write_bytes(damage((folder / "tokenizer.model").read_bytes()))
    words = f"tokenizer {folder / 'tokenizer.model'} is not a SentencePiece model"
    refuses(["data", "prepare", "--input", small_corpus, "--tokenizer", folder, "--out", tmp_path / "data"], words)
    refuses(["pretrain", tiny_run.recipe, "name=other", f"runs_folder={tmp_path}", f"data.tokenizer={folder}"], words)


@pytest.mark.parametrize("size", [900, 1100])
def test_different_tokenizer(refuses, tiny_run, small_corpus, tmp_path, size):
    from moonlight.data.tokenizer_train import train_tokenizer

    folder = tmp_path / "tokenizer"
    train_tokenizer([small_corpus], size, folder)
    refuses(
        ["pretrain", tiny_run.recipe, "name=other", f"runs_folder={tmp_path}", f"data.tokenizer={folder}"],
        "was prepared with the tokenizer of checksum",
        "give the same tokenizer, or prepare the data again",
    )
    refuses(
        ["export", tiny_run.folder, "--out", tmp_path / "hf", "--tokenizer", folder],
        f"tokenizer {folder} has checksum",
        "give that tokenizer with --tokenizer",
    )


def in_manifest(change):
    def edit(folder):
        path = folder / "manifest.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: No such file or directory"),
        (cut("manifest.json"), "manifest.json is not JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[1]"), "is not a data manifest of version 2"),
        (in_manifest(lambda content: content.update(version=9)), "is not a data manifest of version 2"),
        (in_manifest(lambda content: content.update(splits=None)), "manifest.json is corrupt"),
        (in_manifest(lambda content: content.update(splits={})), "manifest.json is corrupt"),
        (in_manifest(lambda content: content["splits"].pop("train")), "manifest.json is corrupt"),
        (in_manifest(lambda content: content["splits"]["train"].update(tokens="9")), "manifest.json is corrupt"),
        (in_manifest(lambda content: content["splits"]["train"].update(dtype="text")), "manifest.json is corrupt"),
        (in_manifest(lambda content: content["splits"]["validation"].pop("bytes")), "manifest.json is corrupt"),
        (in_manifest(lambda content: content.pop("tokenizer")), "manifest.json is corrupt"),
        (in_manifest(lambda content: content["tokenizer"].update(sha256=7)), "manifest.json is corrupt"),
        (in_manifest(lambda content: content["splits"].pop("validation")), "has no held-out documents"),
        (lambda folder: (folder / "train.bin").unlink(), "has no train.bin"),
        (cut("train.bin"), "train.bin is corrupt: it has"),
        (cut("validation.idx"), "validation.idx is corrupt: it has"),
    ],
)
def test_corrupt_data(refuses, tiny_run, tmp_path, edit, words):
    folder = tmp_path / "data"
    shutil.copytree(tiny_run.data, folder)
    edit(folder)
    refuses(
        ["pretrain", tiny_run.recipe, "name=other", f"runs_folder={tmp_path}", f"data.path={folder}"],
        str(folder),
        words,
        "`moonlight data prepare`" if "held-out" not in words else "--validation-share above 0",
    )


def test_data_index_with_invalid_bytes(refuses, as_worker, tiny_run, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(tiny_run.data, folder)
    index = folder / "train.idx"
    index.write_bytes(b"x" * index.stat().st_size)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    shutil.copy(tiny_run.folder / "config.yaml", tmp_path / "runs" / "tiny")
    (tmp_path / "runs" / "tiny" / ".lock").touch()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny_run.recipe.read_text().replace(str(tiny_run.data), str(folder)))
    shutil.copy(recipe, tmp_path / "runs" / "tiny" / "config.yaml")
    refuses(["pretrain", recipe, f"runs_folder={tmp_path / 'runs'}"], f"data {index} is corrupt")


# The command line


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["pretrain"], "Missing argument 'recipe'; see moonlight pretrain --help"),
        (["pretrain", "recipe.yaml", "--fast"], "No such option: --fast; see moonlight pretrain --help"),
        (["tokenizer", "train", "--out", "x"], "Missing option '--input'; see moonlight tokenizer train --help"),
        (["zzz"], "No such command 'zzz'; see moonlight --help"),
        (["generate", "hf", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["export", "runs", "--out", "x", "--max-shard-size", "big"], "--max-shard-size"),
        (["export", "nowhere", "--out", "x"], "nowhere does not exist: give a run folder"),
        (["export", "{run}", "--out", "x", "--dtype", "int8"], "dtype is 'int8': accepted are float32, bfloat16"),
        (["verify", "{run}", "nowhere"], "nowhere is not a Hugging Face folder"),
        (["generate", "nowhere", "--prompt", "a"], "nowhere is not a Hugging Face folder"),
        (["quickstart", "--corpus", "nowhere"], "corpus nowhere does not exist"),
    ],
)
def test_arguments(refuses, tiny_run, arguments, words):
    refuses([argument.format(run=tiny_run.folder) for argument in arguments], words)


def test_debug_prints_the_traceback(tmp_path):
    arguments = ("tokenizer", "train", "--input", tmp_path / "nowhere", "--vocab-size", 500, "--out", tmp_path / "out")
    code, _, err = run_command(*arguments)
    check_line(code, err, ("nowhere does not exist",))
    code, _, err = run_command(*arguments, "--debug")
    lines = err.splitlines()
    assert code == 2 and lines[0] == "Traceback (most recent call last):" and "train_tokenizer" in err
    assert lines[-1].startswith(f"error: input {tmp_path / 'nowhere'} does not exist")


def test_a_launched_process_reports_bad_arguments():
    result = subprocess.run([sys.executable, "-m", "pretrain", "--fast"], cwd=ROOT, capture_output=True, text=True)
    check_line(result.returncode, result.stderr, ("recipe", "see python -m pretrain --help"))
