"""Checkpoints that cannot be exported, averaged or started from; full disks, kills, Ctrl-C."""

import os
import shutil
import signal
import time

import pytest

from checkpoints.average import average
from checkpoints.hf_import import import_folder
from moonlight.errors import CODE_INTERRUPTED
from moonlight.files import sha256_checksum
from tests.support.bad_input import NEWEST, check_line, command, cut, flip, in_state, run_command
from tests.support.hugging_face import change_tensors, make_folder, raw_tensors
from tests.support.suites import quick


@pytest.fixture(scope="module")
def imported(tokenizer_folder, tmp_path_factory):
    """A Hugging Face folder of the tiny run's model with its tokenizer, and its checkpoint; to be copied."""
    place = tmp_path_factory.mktemp("imported")
    make_folder(place / "hf", vocab_size=1024)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, place / "hf")
    import_folder(place / "hf", place / "checkpoint")
    return place


# Checkpoints


def test_export_of_a_checkpoint_that_is_being_written(refuses, runs, tmp_path):
    folder = runs / "tiny" / "checkpoints"
    part = folder / f".{NEWEST}.part"
    (folder / NEWEST).rename(part)
    words = f"{part} is partial: it is still being written, or a killed process left it; give another"
    refuses(["export", part, "--out", tmp_path / "hf"], words)
    (part / "state.json").unlink()
    refuses(["export", part, "--out", tmp_path / "hf"], words)
    shutil.rmtree(folder / "step-00000002")
    (folder / "latest").unlink()
    words = f"{runs / 'tiny'} holds no checkpoint: give a run folder, or a checkpoint such as .../step-00000100"
    refuses(["export", runs / "tiny", "--out", tmp_path / "hf"], words)
    refuses(["average", runs / "tiny", "--last", 2, "--out", tmp_path / "mean"], "has 0 checkpoints")


def test_export_of_a_checkpoint_without_state(refuses, runs, tmp_path):
    folder = runs / "tiny" / "checkpoints" / NEWEST
    (folder / "state.json").unlink()
    refuses(["export", folder, "--out", tmp_path / "hf"], f"{folder} holds no checkpoint: give a run folder, or")


DAMAGES = {
    "truncated": (cut("__0_0.distcp"), "__0_0.distcp has ", " bytes instead of ", "it is truncated"),
    "flipped": (flip, "__0_0.distcp does not match its checksum: it is corrupt"),
    "index": (cut(".metadata"), ".metadata has ", "it is truncated"),
    "state": (cut("state.json"), "state.json is corrupt: invalid content or checksum"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint(refuses, runs, imported, tiny_run, tmp_path, name):
    """Exporting, verifying, averaging and starting from it are refused, whoever wrote it."""
    edit, *words = DAMAGES[name]
    folder = runs / "tiny" / "checkpoints" / NEWEST
    edit(folder)
    refuses(["export", folder, "--out", tmp_path / "hf"], str(folder), *words)
    refuses(["verify", folder, imported / "hf"], str(folder), *words)
    refuses(["average", runs / "tiny", "--last", 2, "--out", tmp_path / "mean"], str(folder), *words)
    own = tmp_path / "checkpoint"
    shutil.copytree(imported / "checkpoint", own)
    edit(own)
    refuses(["export", own, "--out", tmp_path / "hf"], str(own), *words)

    refuses(["import", imported / "hf", "--out", own], str(own), *words)


def test_a_step_that_is_not_there(refuses, runs, tmp_path):
    words = f"{runs / 'tiny'} holds no checkpoint after step 3: it has steps 2, 4"
    refuses(["export", runs / "tiny", "--out", tmp_path / "hf", "--revision-step", 3], words)


def test_a_chat_without_its_marker(refuses, imported, fast_folder, tmp_path):
    shutil.copytree(imported / "checkpoint", tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "checkpoint" / "tokenizer")
    in_state(lambda content: content.update(tokenizer_sha256=""))(tmp_path / "checkpoint")
    in_state(lambda content: content.update(files={k: v for k, v in content["files"].items() if "/" not in k}))(
        tmp_path / "checkpoint"
    )
    arguments = ["export", tmp_path / "checkpoint", "--out", tmp_path / "hf", "--chat"]
    refuses(arguments, f"{tmp_path / 'checkpoint'} has no tokenizer, which --chat needs: give one with --tokenizer")
    words = f"tokenizer {fast_folder} has no <|im_end|>, which ends a message: leave --chat out"
    refuses([*arguments, "--tokenizer", fast_folder], words)


# Averages


def test_averages_that_cannot_be_made(refuses, runs, tmp_path):
    run, out = runs / "tiny", tmp_path / "mean"
    refuses(["average", run, "--last", 1, "--out", out], "--last is 1: it must be at least 2")
    refuses(["average", run, "--last", -2, "--out", out], "--last is -2: it must be at least 2")
    refuses(["average", run, "--last", 3, "--out", out], f"--last is 3: {run} has 2 checkpoints")
    refuses(["average", tmp_path / "nowhere", "--last", 2, "--out", out], "nowhere does not exist: give a run folder")
    in_state(lambda content: content["recipe"]["model"].update(rope_theta=1e4))(run / "checkpoints" / "step-00000002")
    words = f"{run}: the checkpoints after steps 2 and 4 have different models or tokenizers"
    refuses(["average", run, "--last", 2, "--out", out], words)


# Starting from a checkpoint


@pytest.fixture
def begin(refuses, as_worker, tiny_run, tmp_path):
    """Refused when a new run would start from this checkpoint; `as_worker` is the process that trains."""

    def call(checkpoint, *words, overrides=()):
        pretrain = ["pretrain", tiny_run.recipe, "name=new", f"runs_folder={tmp_path / 'new'}"]
        refuses([*pretrain, f"train.initial_checkpoint={checkpoint}", *overrides], *words)

    return call


def test_a_start_from_nothing(begin, tmp_path):
    words = f"{tmp_path / 'nowhere'} does not exist: give a run folder, or a checkpoint such as"
    begin(tmp_path / "nowhere", "train.initial_checkpoint", words)


def test_a_start_from_another_model(begin, tmp_path):
    make_folder(tmp_path / "hf", vocab_size=1024, moe_intermediate_size=16)
    import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    words = f"{tmp_path / 'checkpoint'} was saved from a different model: moe_intermediate_size 16 there, 24 here"
    begin(tmp_path / "checkpoint", words)


def test_a_start_from_another_tokenizer(begin, imported, tmp_path):
    shutil.copytree(imported / "checkpoint", tmp_path / "checkpoint")
    model = {"aux_loss_alpha": 0.01, "initializer_range": 0.08}
    in_state(lambda content: content.update(tokenizer_sha256="0" * 64))(tmp_path / "checkpoint")
    in_state(lambda content: content["recipe"]["model"].update(model))(tmp_path / "checkpoint")
    words = f"train.initial_checkpoint {tmp_path / 'checkpoint'} was trained with the tokenizer of checksum 00000000"
    begin(tmp_path / "checkpoint", words, "prepare the data with the tokenizer of the checkpoint")


def test_a_start_from_a_damaged_checkpoint(begin, runs):
    flip(runs / "tiny" / "checkpoints" / NEWEST)
    begin(runs / "tiny", f"{NEWEST}/__0_0.distcp does not match its checksum: it is corrupt")


def test_no_continuation_from_weights_alone(refuses, as_worker, tiny_run, runs, tmp_path):
    newest = runs / "tiny" / "checkpoints" / NEWEST
    average(runs / "tiny", 2, tmp_path / "mean")
    shutil.rmtree(newest)
    shutil.copytree(tmp_path / "mean", newest)
    in_state(lambda content: content["state"].update(step=3))(newest)
    words = f"checkpoint {newest} holds weights only: set train.initial_checkpoint of a new run to it"
    refuses(["pretrain", tiny_run.recipe, f"runs_folder={runs}"], words)


# Outputs


def test_an_output_that_is_something_else(refuses, imported, tiny_run, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "diary.txt").write_text("my own")
    (tmp_path / "file").write_text("my own")
    (tmp_path / "link").symlink_to("nowhere")
    commands = (["import", imported / "hf"], ["average", tiny_run.folder, "--last", 2], ["export", tiny_run.folder])
    for arguments in commands:
        for name in ("folder", "file", "link"):
            words = f"{tmp_path / name} already exists with different content: choose another folder, or remove it"
            refuses([*arguments, "--out", tmp_path / name], words)
        refuses([*arguments, "--out", tmp_path / "file" / "deeper"], f"folder {tmp_path / 'file'} cannot be written")
    shutil.copytree(imported / "checkpoint", tmp_path / "checkpoint")
    words = f"{tmp_path / 'checkpoint'} already exists with different content: choose another folder, or remove it"
    refuses([*commands[1], "--out", tmp_path / "checkpoint"], words)
    refuses([*commands[2], "--out", tmp_path / "checkpoint"], words)


def test_other_weights_of_the_same_sizes_are_something_else(refuses, imported, tmp_path):
    shutil.copytree(imported, tmp_path / "other")
    change_tensors(tmp_path / "other" / "hf", lambda t: t["lm_head.weight"].neg_())
    out = tmp_path / "other" / "checkpoint"
    refuses(["import", tmp_path / "other" / "hf", "--out", out], f"{out} already exists with different content")


WRITERS = {
    "import": lambda imported, run: ["import", imported / "hf"],
    "export": lambda imported, run: ["export", run.folder],
    "average": lambda imported, run: ["average", run.folder, "--last", 2],
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(imported, tiny_run, tmp_path, name):
    """Export: see also test_bad_runs.py."""
    arguments = WRITERS[name](imported, tiny_run)
    code, _, err = run_command(*arguments, "--out", tmp_path / "out", largest_file=100_000)
    check_line(code, err, (f"{tmp_path / 'out'}: File too large", "ulimit -f"))
    assert not list(tmp_path.iterdir())


def test_an_output_in_a_folder_that_cannot_be_written(imported, tiny_run, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    code, _, err = run_command("import", imported / "hf", "--out", closed / "out")
    check_line(code, err, (f"folder {closed} cannot be written: choose another folder for out",))
    assert not list(closed.iterdir())


# Interruptions


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of 160 MB without a tokenizer, and its checkpoint."""
    place = tmp_path_factory.mktemp("large")
    make_folder(place / "hf", vocab_size=40_000, hidden_size=512, num_hidden_layers=2)
    import_folder(place / "hf", place / "checkpoint")
    assert (place / "hf" / "model.safetensors").stat().st_size > 150e6
    return place


def interrupt(arguments, out, number):
    """Send the signal while weights are being written; returns code, what was said, and the bytes then there."""
    process = command(*arguments, "--out", out)
    part, there = out.with_name(f".{out.name}.part"), 0
    try:
        deadline = time.monotonic() + 120
        while there < 1_000_000:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)
            there = sum(file.stat().st_size for file in part.glob("*") if file.exists())
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, err, there


@pytest.mark.parametrize("name", quick(["import", "export"], "export"))
def test_killed_and_interrupted_in_the_middle(large, tmp_path, name):
    out = tmp_path / "out"
    arguments = {"import": ["import", large / "hf"], "export": ["export", large / "checkpoint"]}[name]

    code, err, there = interrupt(arguments, out, signal.SIGINT)
    assert code == CODE_INTERRUPTED, err
    assert 1_000_000 <= there < 150e6
    assert err == "\ninterrupted: partial output was removed; rerun the command to start again\n"
    assert not list(tmp_path.iterdir())

    code, err, there = interrupt(arguments, out, signal.SIGKILL)
    assert code == -signal.SIGKILL and 1_000_000 <= there < 150e6
    assert [entry.name for entry in tmp_path.iterdir()] == [".out.part"], "the kill came too late"

    code, said, err = run_command(*arguments, "--out", out)
    assert code == 0 and not err and f"{out}: written" in said
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    if name == "import":
        for file in ("__0_0.distcp", ".metadata"):
            assert sha256_checksum(out / file) == sha256_checksum(large / "checkpoint" / file)
    else:
        assert raw_tensors(out) == raw_tensors(large / "hf")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "{run}", "--out", "{out}", "--license", "apache2.0"], "did you mean apache-2.0?"),
        (["export", "nowhere", "--out", "{out}"], "nowhere does not exist: give a run folder"),
        (["average", "nowhere", "--last", "2", "--out", "{out}"], "nowhere does not exist: give a run folder"),
        (["verify", "{hf}", "{run}"], "{hf} is a Hugging Face folder: give a run folder or a checkpoint"),
    ],
)
def test_slips_of_the_hand(refuses, tiny_run, tmp_path, arguments, words):
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    places = {"run": tiny_run.folder, "out": tmp_path / "out", "hf": hf}
    refuses([argument.format(**places) for argument in arguments], words.format(**places))
    assert not (tmp_path / "out").exists()
