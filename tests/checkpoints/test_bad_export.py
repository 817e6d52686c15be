"""Checkpoints that cannot be exported, averaged or used as initial weights; full disks, kills, Ctrl-C."""

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
    """A Hugging Face folder with the tiny run's model shape and tokenizer, and its checkpoint. Copy before changes."""
    folder = tmp_path_factory.mktemp("imported")
    make_folder(folder / "hf", vocab_size=1024)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder / "hf")
    import_folder(folder / "hf", folder / "checkpoint")
    return folder


# Checkpoints


def test_export_of_a_partial_checkpoint(refuses, runs, tmp_path):
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
def test_a_corrupt_checkpoint(refuses, runs, imported, tiny_run, tmp_path, name):
    """Export, verification and averaging reject it, written by a run or by an import."""
    edit, *words = DAMAGES[name]
    folder = runs / "tiny" / "checkpoints" / NEWEST
    edit(folder)
    refuses(["export", folder, "--out", tmp_path / "hf"], str(folder), *words)
    refuses(["verify", folder, imported / "hf"], str(folder), *words)
    refuses(["average", runs / "tiny", "--last", 2, "--out", tmp_path / "mean"], str(folder), *words)
    imported_copy = tmp_path / "checkpoint"
    shutil.copytree(imported / "checkpoint", imported_copy)
    edit(imported_copy)
    refuses(["export", imported_copy, "--out", tmp_path / "hf"], str(imported_copy), *words)

    refuses(["import", imported / "hf", "--out", imported_copy], str(imported_copy), *words)


def test_a_missing_step(refuses, runs, tmp_path):
    words = f"{runs / 'tiny'} holds no checkpoint after step 3: it has steps 2, 4"
    refuses(["export", runs / "tiny", "--out", tmp_path / "hf", "--revision-step", 3], words)


def test_chat_export_without_an_end_marker(refuses, imported, fast_folder, tmp_path):
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


def test_invalid_averages(refuses, runs, tmp_path):
    run, out = runs / "tiny", tmp_path / "mean"
    refuses(["average", run, "--last", 1, "--out", out], "--last is 1: it must be at least 2")
    refuses(["average", run, "--last", -2, "--out", out], "--last is -2: it must be at least 2")
    refuses(["average", run, "--last", 3, "--out", out], f"--last is 3: {run} has 2 checkpoints")
    refuses(["average", tmp_path / "nowhere", "--last", 2, "--out", out], "nowhere does not exist: give a run folder")
    in_state(lambda content: content["recipe"]["model"].update(rope_theta=1e4))(run / "checkpoints" / "step-00000002")
    words = f"{run}: the checkpoints after steps 2 and 4 have different models or tokenizers"
    refuses(["average", run, "--last", 2, "--out", out], words)


# Initial checkpoints


@pytest.fixture
def initial_refused(refuses, as_worker, tiny_run, tmp_path):
    """Check that a new run rejects an initial checkpoint. `as_worker` makes this process the one that trains."""

    def call(checkpoint, *words, overrides=()):
        pretrain = ["pretrain", tiny_run.recipe, "name=new", f"runs_folder={tmp_path / 'new'}"]
        refuses([*pretrain, f"train.initial_checkpoint={checkpoint}", *overrides], *words)

    return call


def test_initial_checkpoint_that_does_not_exist(initial_refused, tmp_path):
    words = f"{tmp_path / 'nowhere'} does not exist: give a run folder, or a checkpoint such as"
    initial_refused(tmp_path / "nowhere", "train.initial_checkpoint", words)


def test_initial_checkpoint_of_another_model(initial_refused, tmp_path):
    make_folder(tmp_path / "hf", vocab_size=1024, moe_intermediate_size=16)
    import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    words = f"{tmp_path / 'checkpoint'} was saved from a different model: moe_intermediate_size 16 there, 24 here"
    initial_refused(tmp_path / "checkpoint", words)


def test_initial_checkpoint_of_another_tokenizer(initial_refused, imported, tmp_path):
    shutil.copytree(imported / "checkpoint", tmp_path / "checkpoint")
    model = {"aux_loss_alpha": 0.01, "initializer_range": 0.08}
    in_state(lambda content: content.update(tokenizer_sha256="0" * 64))(tmp_path / "checkpoint")
    in_state(lambda content: content["recipe"]["model"].update(model))(tmp_path / "checkpoint")
    words = f"train.initial_checkpoint {tmp_path / 'checkpoint'} was trained with the tokenizer of checksum 00000000"
    initial_refused(tmp_path / "checkpoint", words, "prepare the data with the tokenizer of the checkpoint")


def test_corrupt_initial_checkpoint(initial_refused, runs):
    flip(runs / "tiny" / "checkpoints" / NEWEST)
    initial_refused(runs / "tiny", f"{NEWEST}/__0_0.distcp does not match its checksum: it is corrupt")


def test_a_checkpoint_of_weights_only_cannot_be_resumed(refuses, as_worker, tiny_run, runs, tmp_path):
    newest = runs / "tiny" / "checkpoints" / NEWEST
    average(runs / "tiny", 2, tmp_path / "mean")
    shutil.rmtree(newest)
    shutil.copytree(tmp_path / "mean", newest)
    in_state(lambda content: content["state"].update(step=3))(newest)
    words = f"checkpoint {newest} holds weights only: set train.initial_checkpoint of a new run to it"
    refuses(["pretrain", tiny_run.recipe, f"runs_folder={runs}"], words)


# Outputs


def test_an_output_with_different_content(refuses, imported, tiny_run, tmp_path):
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


def test_other_weights_of_the_same_sizes_are_different_content(refuses, imported, tmp_path):
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
    """A full disk gives one line and leaves no files. See also test_bad_runs.py."""
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
    folder = tmp_path_factory.mktemp("large")
    make_folder(folder / "hf", vocab_size=40_000, hidden_size=512, num_hidden_layers=2)
    import_folder(folder / "hf", folder / "checkpoint")
    assert (folder / "hf" / "model.safetensors").stat().st_size > 150e6
    return folder


def interrupt(arguments, out, signal_number):
    """Signal a command that is writing weights. Return exit code, stderr and bytes written before."""
    process = command(*arguments, "--out", out)
    part, num_bytes = out.with_name(f".{out.name}.part"), 0
    try:
        deadline = time.monotonic() + 120
        while num_bytes < 1_000_000:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)
            num_bytes = sum(file.stat().st_size for file in part.glob("*") if file.exists())
        os.kill(process.pid, signal_number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, err, num_bytes


@pytest.mark.parametrize("name", quick(["import", "export"], "export"))
def test_killed_and_interrupted_while_writing(large, tmp_path, name):
    out = tmp_path / "out"
    arguments = {"import": ["import", large / "hf"], "export": ["export", large / "checkpoint"]}[name]

    code, err, num_bytes = interrupt(arguments, out, signal.SIGINT)
    assert code == CODE_INTERRUPTED, err
    assert 1_000_000 <= num_bytes < 150e6
    assert err == "\ninterrupted: partial output was removed; rerun the command to start again\n"
    assert not list(tmp_path.iterdir())

    code, err, num_bytes = interrupt(arguments, out, signal.SIGKILL)
    assert code == -signal.SIGKILL and 1_000_000 <= num_bytes < 150e6
    assert [entry.name for entry in tmp_path.iterdir()] == [".out.part"], "the kill came too late"

    code, output, err = run_command(*arguments, "--out", out)
    assert code == 0 and not err and f"{out}: written" in output
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
def test_mistyped_arguments(refuses, tiny_run, tmp_path, arguments, words):
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    paths = {"run": tiny_run.folder, "out": tmp_path / "out", "hf": hf}
    refuses([argument.format(**paths) for argument in arguments], words.format(**paths))
    assert not (tmp_path / "out").exists()
