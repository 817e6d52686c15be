"""`moonlight sft`: a killed and resumed run is bit-identical, and invalid input ends with one error line."""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from checkpoints.export import export
from checkpoints.hf_import import import_folder
from moonlight.config.load import load_recipe, to_yaml
from moonlight.config.timeline import RunSchedule
from moonlight.data.prepare_chat import prepare_chat
from moonlight.errors import UserError
from moonlight.train import run_folder
from moonlight.train.metrics import read_metrics
from tests.support.chats import tuning_recipe, write_chats
from tests.support.comparisons import check_same
from tests.support.faults import kill_after
from tests.support.layouts import LAYOUTS, make_run

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class SftInputs:
    """Conversations, an initial checkpoint, and a recipe."""

    folder: Path
    recipe: Path
    data: Path


@pytest.fixture(scope="module")
def inputs(tiny_run, tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    write_chats(folder / "chats.jsonl")
    prepare_chat([folder / "chats.jsonl"], tokenizer_folder, folder / "data", sequence_length=64, validation_share=0.2)
    tiny = load_recipe(tiny_run.folder / "config.yaml")
    config = tuning_recipe(folder / "data", tokenizer_folder, 64, parallel=LAYOUTS["EP2"][1])
    train_config = replace(
        config.train,
        initial_checkpoint=str(tiny_run.folder),
        train_steps=0,
        epochs=6,
        global_batch_size=4,
        micro_batch_size=2,
        save_every_steps=4,
        validate_every_steps=10,
        threads_per_process=1,
    )
    config = replace(
        config,
        name="tuned",
        runs_folder=str(folder / "uninterrupted"),
        model=tiny.model,
        data=replace(config.data, conversations=True),
        parallel=replace(config.parallel, num_processes=2),
        train=train_config,
    )
    (folder / "recipe.yaml").write_text(to_yaml(config))
    return SftInputs(folder, folder / "recipe.yaml", folder / "data")


def sft(inputs, *overrides):
    command = [sys.executable, "-m", "moonlight.cli", "sft", str(inputs.recipe), *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, text=True
    )


def finish(process):
    out, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    return out, errors


def test_epochs_become_steps(inputs):
    config = run_folder.resolve_train_steps(load_recipe(inputs.recipe))
    windows = run_folder.check_data(config)["data"]["splits"]["train"]["windows"]
    assert config.train.train_steps == -(-6 * windows // 4) > 12


@pytest.mark.slow
def test_killed_tuning_is_bit_identical(inputs):
    """The command is killed by SIGKILL twice; its workers must end with it, and the loss must fall."""
    out, _ = finish(sft(inputs))
    assert "held-out loss" in out and "bits per byte" not in out
    assert "this run is already finished" in finish(sft(inputs))[0]
    killed = f"runs_folder={inputs.folder / 'killed'}"
    metrics = inputs.folder / "killed" / "tuned"
    for steps in (3, 9):
        process = sft(inputs, killed)
        kill_after(process, metrics, steps)
    _, errors = finish(sft(inputs, killed))
    assert "resuming after step" in errors
    uninterrupted = run_folder.resolve_train_steps(load_recipe(inputs.recipe))
    check_same(uninterrupted, replace(uninterrupted, runs_folder=str(inputs.folder / "killed")))
    losses = [entry["loss/train"] for entry in read_metrics(inputs.folder / "uninterrupted" / "tuned")]
    assert losses[-1] < losses[0] - 0.1


def test_an_imported_model_is_tuned_like_our_own_checkpoint(inputs, tiny_run, tmp_path):
    """The same weights through a Hugging Face folder must give equal losses; AdamW must differ after one step."""
    export(tiny_run.folder, tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "imported")
    losses = {}
    for name, override in (
        ("own", "optimizer.name=muon"),
        ("imported", f"train.initial_checkpoint={tmp_path / 'imported'}"),
        ("adamw", "optimizer.name=adamw"),
    ):
        short = ("parallel.num_processes=1", "parallel.expert_parallel_size=1", "train.stop_at_step=3")
        finish(sft(inputs, f"runs_folder={tmp_path / name}", *short, override))
        losses[name] = [entry["loss/train"] for entry in read_metrics(tmp_path / name / "tuned")]
    assert losses["imported"] == losses["own"] and len(losses["own"]) == 3
    assert losses["adamw"][0] == losses["own"][0] and losses["adamw"][2] != losses["own"][2]


@pytest.mark.parametrize(
    ("command", "override", "words"),
    [
        ("pretrain", (), ["trains on conversations", "use moonlight sft"]),
        ("sft", ("data.conversations=false", "train.epochs=0", "train.train_steps=5"), ["trains on text", "pretrain"]),
        ("sft", ("train.initial_checkpoint=''",), ["train.initial_checkpoint is missing"]),
        ("sft", ("data.mask_documents=false",), ["data.conversations needs data.mask_documents=true"]),
        ("sft", ("data.sequence_length=32",), ["data.sequence_length is 32", "was packed for 64"]),
        ("sft", ("train.train_steps=7",), ["train.train_steps is 7", "set one of them to 0"]),
        ("sft", ("train.initial_checkpoint=nowhere",), ["nowhere"]),
        ("sft", ("schedule.warmup_steps=500",), ["train.epochs", "steps of", "fewer than schedule.warmup_steps (500)"]),
    ],
)
def test_invalid_settings_are_refused(inputs, refuses, tmp_path, command, override, words):
    refuses([command, inputs.recipe, f"runs_folder={tmp_path}", *override], *words)


def test_conversations_and_text_are_not_confused(inputs, refuses, data_folder, tokenizer_folder, tmp_path):
    arguments = ["sft", inputs.recipe, f"runs_folder={tmp_path}", "train.epochs=0", "train.train_steps=5"]
    refuses([*arguments, f"data.path={data_folder}"], "holds text", "for `moonlight pretrain`")
    text_config = make_run(tmp_path, inputs.data, tokenizer_folder)
    recipe = inputs.folder / "text.yaml"
    recipe.write_text(to_yaml(text_config))
    refuses(["pretrain", recipe], "holds conversations", "for `moonlight sft`")


def test_the_16b_recipe_matches_the_paper():
    """The recipe must use Muon, two epochs at 4K tokens and a learning rate from 5e-5 to 0.

    The data sets the number of steps of an epoch, so a schedule without data needs `train.train_steps`.
    """
    config = load_recipe(ROOT / "configs" / "sft" / "moonlight_16b_a3b.yaml", ["train.train_steps=1000"])
    assert (config.optimizer.name, config.train.epochs, config.data.sequence_length) == ("muon", 2, 4096)
    timeline = RunSchedule(config)
    assert timeline.num_steps == 1000 and not config.stages and not config.train.batch_growth
    rates = [timeline.at(step).learning_rate for step in (1, 500, 1000)]
    assert rates == pytest.approx([5e-5 * (1 - 1 / 1000), 2.5e-5, 0])
    assert config.model == load_recipe(ROOT / "configs" / "moonlight_16b_a3b" / "pretrain.yaml").model
    with pytest.raises(UserError, match=r"train\.epochs is 2: .* also set train\.train_steps"):
        RunSchedule(load_recipe(ROOT / "configs" / "sft" / "moonlight_16b_a3b.yaml"))
