"""Invalid mixtures must end with one error line and exit code 2."""

import json
import shutil
from dataclasses import replace

import pytest

from moonlight.config.data import SourceConfig
from moonlight.config.load import load_recipe, to_yaml
from moonlight.config.schedule import StageConfig
from moonlight.data.prepare import prepare
from tests.support.bad_input import run_command


@pytest.fixture
def mixed(tiny_run, tmp_path):
    """Write a recipe with two sources: the tiny run's data, and a copy of it, b, that tests may change."""
    shutil.copytree(tiny_run.data, tmp_path / "b")

    def write(b=None, **changes):
        config = load_recipe(tiny_run.recipe)
        sources = {"a": SourceConfig(path=str(tiny_run.data)), "b": SourceConfig(path=str(tmp_path / "b"), **(b or {}))}
        data = replace(config.data, path="", sources=sources)
        changes = {"name": "other", "runs_folder": str(tmp_path / "runs")} | changes
        path = tmp_path / "recipe.yaml"
        path.write_text(to_yaml(replace(config, data=data, **changes)))
        return path

    return write


def test_a_missing_source(refuses, mixed, tmp_path):
    recipe = mixed()
    shutil.rmtree(tmp_path / "b")
    refuses(["pretrain", recipe], f"data {tmp_path / 'b'}/manifest.json: No such file or directory; make the folder")


def test_a_source_of_another_tokenizer(refuses, mixed, tiny_run, fast_folder, tmp_path):
    recipe = mixed()
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "text").mkdir()
    for index in range(40):
        (tmp_path / "text" / f"{index}.txt").write_text(f"document {index} " * 50)
    prepare([tmp_path / "text"], fast_folder, tmp_path / "b", validation_share=0.3)
    refuses(["pretrain", recipe], f"data {tmp_path / 'b'} was prepared with the tokenizer of checksum")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda splits: splits.pop("validation"), "{b} has no held-out documents: prepare it with --validation-share"),
        (
            lambda splits: splits["train"].update(largest_id=5000),
            "model.vocab_size is 1024: id 5000 occurs in the data {b}, which needs at least 5001 rows",
        ),
    ],
)
def test_a_source_that_does_not_fit(refuses, mixed, tmp_path, change, words):
    recipe = mixed()
    path = tmp_path / "b" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest["splits"])
    path.write_text(json.dumps(manifest))
    refuses(["pretrain", recipe], words.format(b=tmp_path / "b"))


def test_a_source_too_small_for_one_window(refuses, mixed, tokenizer_folder, tmp_path):
    recipe = mixed()
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": str(index)}) for index in range(10)))
    prepare([tmp_path / "text.jsonl"], tokenizer_folder, tmp_path / "b", validation_share=0.5)
    refuses(["pretrain", recipe], f"data {tmp_path / 'b'} has ", "too few for one sequence of data.sequence_length 32")


def test_more_epochs_than_are_allowed(refuses, mixed, tiny_run):
    """Of four steps of 8 sequences, the last two read 16 sequences of b alone; that must exceed max_epochs."""
    stages = {
        "one": StageConfig(from_tokens=0, to_tokens=16 * 32, lr=1e-3, decay="constant", weights={"a": 1.0}),
        "two": StageConfig(from_tokens=16 * 32, to_tokens=32 * 32, lr=1e-3, decay="linear", weights={"b": 1.0}),
    }
    tokens = json.loads((tiny_run.data / "manifest.json").read_text())["splits"]["train"]["tokens"]
    epochs = 16 / ((tokens - 1) // 32)
    config = load_recipe(tiny_run.recipe)
    schedule = {"stages": stages, "schedule": None, "train": replace(config.train, train_steps=0)}
    refuses(
        ["pretrain", mixed({"max_epochs": epochs / 2}, **schedule)],
        f"source b needs {epochs:.4g} epochs up to the end of this run, data.sources.b.max_epochs is "
        f"{epochs / 2:g}: give it less weight, more text, or more epochs",
    )


def test_a_stage_with_an_unknown_source(refuses, mixed):
    recipe = mixed()
    text = recipe.read_text().replace(
        "schedule:", "stages: {one: {from_tokens: 0, to_tokens: 2048, lr: 0.001, weights: {c: 1.0}}}\nunused:"
    )
    recipe.write_text(
        text.split("unused:")[0] + "parallel:" + text.split("parallel:")[1].replace("train_steps: 4", "train_steps: 0")
    )
    refuses(["pretrain", recipe], "stages.one.weights names c: the sources are a, b")


def test_a_run_resumed_without_one_of_its_sources(refuses, mixed, tmp_path, tiny_run):
    recipe = mixed()
    folder = tmp_path / "runs" / "other"
    folder.mkdir(parents=True)
    shutil.copy(recipe, folder / "config.yaml")
    config = load_recipe(recipe)
    sources = {"a": config.data.sources["a"]}
    recipe.write_text(to_yaml(replace(config, data=replace(config.data, sources=sources))))
    refuses(["pretrain", recipe], f"{folder} holds a run with other settings: data.sources.b.path (")


def test_a_later_stage_needs_an_initial_checkpoint(refuses, tiny_run, tmp_path):
    recipe = tmp_path / "stages.yaml"
    recipe.write_text(
        f"base: {tiny_run.recipe}\nname: lone\nschedule: null\nstages:\n"
        "  first: {from_tokens: 0, to_tokens: 1000, lr: 1.0e-3, decay: constant}\n"
        "  second: {from_tokens: 1000, to_tokens: 2000, lr: 1.0e-3, decay: linear}\n"
        "train: {train_steps: 0}\n"
    )
    words = "train.only_stage is 'second', which is not the first stage: set train.initial_checkpoint"
    refuses(["pretrain", recipe, "train.only_stage=second"], words)


def test_a_cache_folder_that_is_a_file(tmp_path, mixed):
    (tmp_path / "file").write_text("")
    code, _, err = run_command("pretrain", mixed(), f"data.cache_folder={tmp_path / 'file'}")
    assert code == 2 and err.count("\n") == 1, err
    assert f"folder {tmp_path / 'file' / 'other'} cannot be written (Not a directory)" in err
