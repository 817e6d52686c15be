"""Bad checkpoints, run folders, disks and processes end with one error line, exit code 2 and no partial output."""

import json
import os
import pickle
import time

import psutil
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from checkpoints.reader import open_checkpoint
from moonlight.dist_checkpoint import state as checkpoint_files
from moonlight.errors import report_errors
from moonlight.files import atomic_write_text
from moonlight.train.events import EventLog, read_events
from tests.support.bad_input import NEWEST, MaliciousPickle, check_line, command, cut, flip, in_state, run_command, sign
from tests.support.suites import quick

# Checkpoints

KEY = "embedding.word_embeddings.weight"
MOMENTUM = f"optimizer.exp_avg.{KEY}"


def write_invalid_index(folder):
    (folder / ".metadata").write_bytes(pickle.dumps({"weights": 1}))
    sign(folder)


def in_index(change):
    """Return an edit that changes the index entries of tensors and signs the checkpoint again."""

    def edit(folder):
        index = pickle.loads((folder / ".metadata").read_bytes())
        change(index.state_dict_metadata)
        if "extra" in index.state_dict_metadata:
            location = index.storage_data[MetadataIndex(MOMENTUM, (0, 0))]
            index.storage_data[MetadataIndex("extra", (0, 0))] = location
        (folder / ".metadata").write_bytes(pickle.dumps(index))
        sign(folder)

    return edit


CORRUPT_STATE = "state.json is corrupt: invalid content or checksum"


@pytest.mark.parametrize(
    "edit, training, exporting",
    [
        (lambda folder: (folder / "__0_0.distcp").unlink(), None, "is incomplete: __0_0.distcp is missing"),
        (lambda folder: (folder / "state.json").unlink(), None, f"latest names no checkpoint ('{NEWEST}')"),
        (cut("state.json"), None, CORRUPT_STATE),
        (lambda folder: (folder / "state.json").write_bytes(b"\xff"), None, CORRUPT_STATE),
        (in_state(lambda content: [content]), None, CORRUPT_STATE),
        (in_state(lambda content: content.update(files=[1])), None, CORRUPT_STATE),
        (in_state(lambda content: content.update(files={})), None, CORRUPT_STATE),
        (in_state(lambda content: content.update(state={"step": "4"})), None, CORRUPT_STATE),
        (in_state(lambda content: content.update(state={"step": 4, "stage": 2})), None, CORRUPT_STATE),
        (
            in_state(lambda content: content["recipe"].pop("model")),
            None,
            "state.json cannot be used: recipe key model is missing",
        ),
        (
            in_state(lambda content: content["recipe"]["model"].update(hidden_size=64)),
            "was saved from a different model: hidden_size 64 there, 32 here",
            "has shape (1024, 32), expected (1024, 64)",
        ),
        (
            in_state(lambda content: content["recipe"]["optimizer"].update(name="adamw")),
            "holds the state of adamw; the recipe has muon",
            None,
        ),
        (write_invalid_index, None, ".metadata is invalid: it is not an index"),
        (
            in_index(lambda entries: setattr(entries[KEY], "size", torch.Size([2048, 32]))),
            None,
            f".metadata is invalid: chunks of {KEY} are missing",
        ),
        (
            in_index(lambda entries: entries.pop(MOMENTUM)),
            f"lacks {MOMENTUM}, which the run needs: was a parameter frozen when it was saved",
            None,
        ),
        (
            in_index(lambda entries: entries.update(extra=entries[MOMENTUM])),
            "holds extra, which the run does not have: was a parameter frozen or removed since it was saved",
            None,
        ),
    ],
)
def test_bad_checkpoint(refuses, as_worker, tiny_run, runs, tmp_path, edit, training, exporting):
    """Resuming and exporting must refuse it with these words; None is not checked.

    test_damage covers corrupt checkpoints, which a resuming run skips.
    """
    edit(runs / "tiny" / "checkpoints" / NEWEST)
    if training is not None:
        refuses(["pretrain", tiny_run.recipe, f"runs_folder={runs}"], NEWEST, training)
    if exporting is not None:
        refuses(["export", runs / "tiny", "--out", tmp_path / "hf"], NEWEST, exporting)


def test_no_valid_checkpoint_is_left(refuses, as_worker, tiny_run, runs):
    for name in ("step-00000002", NEWEST):
        flip(runs / "tiny" / "checkpoints" / name)
    words = (f"{runs / 'tiny' / 'checkpoints'} holds no valid checkpoint (2 corrupt: ", NEWEST, "step-00000002")
    refuses(["pretrain", tiny_run.recipe, f"runs_folder={runs}"], *words)


def test_a_later_checkpoint_format_is_refused(refuses, as_worker, monkeypatch, tiny_run, runs, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "FORMAT", 3)
        in_state(lambda content: content.update(more=1))(runs / "tiny" / "checkpoints" / NEWEST)
    words = f"{NEWEST} has format 3: this version of the software reads formats up to 2; use the version that wrote it"
    refuses(["pretrain", tiny_run.recipe, f"runs_folder={runs}"], words)
    refuses(["export", runs / "tiny", "--out", tmp_path / "hf"], words)


def test_the_first_format_is_read(tiny_run, runs):
    """A checkpoint without a format number and without a checksum of state.json must load."""
    folder = runs / "tiny" / "checkpoints" / NEWEST
    content = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({k: v for k, v in content.items() if k not in ("format", "xxh3")}))
    tensors, expected = (open_checkpoint(path) for path in (folder, tiny_run.folder))
    assert torch.equal(tensors.read(KEY), expected.read(KEY)) and tensors.state.step == 4


@pytest.mark.parametrize("content", ["step-00000099", "", "..", "/etc", b"\xff", "folder"])
def test_latest_names_no_checkpoint(refuses, runs, tmp_path, content):
    latest = runs / "tiny" / "checkpoints" / "latest"
    latest.unlink()
    if content == "folder":
        latest.mkdir()
    else:
        latest.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = (f"{latest} names no checkpoint", "write one of these into it: step-00000002, step-00000004")
    refuses(["export", runs / "tiny", "--out", tmp_path / "hf"], *words)


def malicious_index(folder, mark):
    (folder / ".metadata").write_bytes(pickle.dumps(MaliciousPickle(mark)))


def malicious_file(folder, mark):
    """Write a malicious pickle to a new file, and return its storage location."""
    path = folder / "__0_9.distcp"
    torch.save(MaliciousPickle(mark), path)
    return _StorageInfo(path.name, 0, path.stat().st_size)


def malicious_tensor(folder, mark):
    """Point one tensor of a valid index to a malicious file."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.storage_data[MetadataIndex(KEY, (0, 0))] = malicious_file(folder, mark)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def malicious_bytes(folder, mark):
    """Declare one tensor of a valid index as bytes, which torch unpickles."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.state_dict_metadata[KEY] = BytesStorageMetadata()
    index.storage_data[MetadataIndex(KEY)] = malicious_file(folder, mark)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


@pytest.mark.parametrize(
    "forge, words",
    [
        (malicious_index, ".metadata is invalid: posix.mkdir is not allowed in an index"),
        (malicious_tensor, f"__0_9.distcp is invalid: {KEY} in it is not a tensor"),
        (
            malicious_bytes,
            ".metadata is invalid: torch.distributed.checkpoint.metadata.BytesStorageMetadata is not allowed",
        ),
    ],
)
def test_malicious_checkpoint(refuses, runs, tmp_path, forge, words):
    folder, mark = runs / "tiny" / "checkpoints" / NEWEST, tmp_path / "mark"
    forge(folder, mark)
    sign(folder)
    refuses(["export", runs / "tiny", "--out", tmp_path / "hf"], str(folder), words)
    assert not mark.exists()


# Folders


@pytest.mark.parametrize("existing", ["folder", "file", "below a file"])
def test_output_has_different_content(refuses, tiny_run, small_corpus, tmp_path, existing):
    out = tmp_path / "out"
    if existing == "folder":
        out.mkdir()
        (out / "diary.txt").write_text("my own")
    else:
        out.write_text("my own")
    if existing == "below a file":
        out = out / "deeper"
        words = (f"folder {tmp_path / 'out'} cannot be written",)
    else:
        words = (f"{out} already exists with different content: choose another folder, or remove it",)
    refuses(["tokenizer", "train", "--input", small_corpus, "--vocab-size", 1024, "--out", out], *words)
    prepare = ["data", "prepare", "--input", small_corpus, "--tokenizer", tiny_run.tokenizer, "--out", out]
    refuses([*prepare, "--workers", 1], *words)
    refuses(["export", tiny_run.folder, "--out", out], *words)
    assert (tmp_path / "out" / "diary.txt" if existing == "folder" else tmp_path / "out").read_text() == "my own"


def test_run_folder_has_different_content(refuses, tiny_run, tmp_path):
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "monday.txt").write_text("my own")
    pretrain = ["pretrain", tiny_run.recipe, f"runs_folder={tmp_path}"]
    refuses([*pretrain, "name=diary"], f"{tmp_path / 'diary'} already exists with different content (monday.txt)")
    (tmp_path / "note").write_text("my own")
    refuses([*pretrain, "name=note"], f"{tmp_path / 'note'} is a file: choose another name")


def test_run_folder_has_other_settings(refuses, tiny_run, tmp_path):
    words = f"{tiny_run.folder} holds a run with other settings: schedule.lr (0.002 there, 0.5 now); give this one"
    refuses(["pretrain", tiny_run.recipe, "schedule.lr=0.5"], words, "resume with the new settings by --force")


def test_force_resumes_with_other_settings(tiny_run, runs):
    """The run must resume from its checkpoint and log the changed settings; another model is refused."""
    changes = ["schedule.lr=0.001", "train.train_steps=6"]
    arguments = ["pretrain", tiny_run.recipe, f"runs_folder={runs}", "--force"]
    code, _, err = run_command(*arguments, *changes)
    assert code == 0, err
    events = {event["event"]: event for event in read_events(runs / "tiny")}
    assert events["resumed"]["step"] == events["forced"]["step"] == 4 and events["finished"]["step"] == 6
    assert events["forced"]["changed"] == ["schedule.lr (0.002 there, 0.001 now)", "train.train_steps (4 there, 6 now)"]
    code, _, err = run_command(*arguments, *changes, "model.moe_intermediate_size=48", "train.train_steps=8")
    check_line(code, err, ("was saved from a different model: moe_intermediate_size 24 there, 48 here",))


# Memory


@pytest.mark.parametrize("processes", quick([1, 2], 1))
def test_out_of_memory_names_what_helps(tiny_run, tmp_path, processes):
    """A head of 40 million rows does not fit into 8 GiB of address space."""
    arguments = ["pretrain", tiny_run.recipe, f"runs_folder={tmp_path}", "model.vocab_size=40000000"]
    code, _, err = run_command(*arguments, f"parallel.num_processes={processes}", max_memory=8 << 30)
    words = ("out of memory: ", "train.micro_batch_size (2)", "data.sequence_length (32)", "momentum_dtype (float32)")
    check_line(code, err, (*words, "parallel.expert_parallel_size (1)", "optimizer.master_weights (float32)"))


# A clock that runs backwards


def test_a_clock_that_runs_backwards_is_reported_once(tmp_path, capfd):
    (tmp_path / "events.jsonl").write_text(json.dumps({"time": time.time() + 7200, "event": "saved", "step": 3}))
    events = EventLog(tmp_path, writes=True)
    events.add("resumed", 3)
    events.add("saved", 4)
    err = capfd.readouterr().err
    assert err.startswith("warning: the clock of this machine is 7200 s before the last event") and err.count("\n") == 1
    assert [(event["event"], event["step"]) for event in read_events(tmp_path)] == [
        ("saved", 3),
        ("resumed", 3),
        ("saved", 4),
    ]


def test_run_folder_with_a_corrupt_recipe(refuses, tiny_run, runs):
    (runs / "tiny" / "config.yaml").write_text("name: tiny\n")
    refuses(
        ["pretrain", tiny_run.recipe, f"runs_folder={runs}"],
        f"{runs / 'tiny'} cannot be resumed, its config.yaml is corrupt: recipe key model is missing",
    )


def test_corrupt_metrics(refuses, as_worker, tiny_run, runs):
    with (runs / "tiny" / "metrics.jsonl").open("a") as file:
        file.write("no json\n")
    refuses(["pretrain", tiny_run.recipe, f"runs_folder={runs}"], "metrics.jsonl is corrupt: line 5 is not JSON")


# A full disk


def test_full_disk_names_the_file(tmp_path, capfd):
    path = tmp_path / "file"
    (tmp_path / ".file.part").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as exit_info, report_errors(debug=False):
        atomic_write_text(path, "text")
    words = (f"{path}: No space left on device; free some space, or choose a folder on another disk",)
    check_line(exit_info.value.code, capfd.readouterr().err, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", quick(["tokenizer", "data", "export"], "data"))
def test_full_disk(tiny_run, small_corpus, tmp_path, name):
    out = tmp_path / "out"
    arguments = {
        "tokenizer": ["tokenizer", "train", "--input", small_corpus, "--vocab-size", 500],
        "data": ["data", "prepare", "--input", small_corpus, "--tokenizer", tiny_run.tokenizer, "--workers", 2],
        "export": ["export", tiny_run.folder],
    }[name]
    code, _, err = run_command(*arguments, "--out", out, largest_file=4096)
    check_line(code, err, (f"{out}: File too large", "ulimit -f"))
    assert not list(tmp_path.iterdir())


def test_full_disk_during_a_checkpoint_of_two_processes(tiny_run, tmp_path):
    arguments = ["pretrain", tiny_run.recipe, f"runs_folder={tmp_path}", "parallel.num_processes=2"]
    code, _, err = run_command(*arguments, largest_file=60_000)
    lines = err.splitlines()
    assert code == 2 and sum(line.startswith("error: ") for line in lines) == 1, err
    checkpoints = [f"checkpoint {tmp_path / 'tiny' / 'checkpoints' / name} could" for name in ("step-00000002", NEWEST)]
    assert any(line.startswith(f"warning: {checkpoints[0]}") and "training continues" in line for line in lines), err
    assert checkpoints[1] in lines[-1] and "ulimit -f" in lines[-1]
    assert "Traceback" not in err and "bytes are free" in lines[-1]
    assert not list((tmp_path / "tiny" / "checkpoints").iterdir())


# Several processes


def test_an_error_of_all_workers_is_reported_once(tiny_run, runs):
    for name in ("step-00000002", NEWEST):
        flip(runs / "tiny" / "checkpoints" / name)
        in_state(lambda content: content["state"].update(step=3))(runs / "tiny" / "checkpoints" / name)
    code, _, err = run_command("pretrain", tiny_run.recipe, f"runs_folder={runs}", "parallel.num_processes=2")
    check_line(code, err, (f"{NEWEST}/__0_0.distcp does not match its checksum",))


def test_a_bug_shows_its_traceback_once(tiny_run, tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "tensorboard.py").write_text("raise RuntimeError('a broken package')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'modules'}:{os.environ.get('PYTHONPATH', '')}"}
    arguments = ["pretrain", tiny_run.recipe, f"runs_folder={tmp_path / 'runs'}", "parallel.num_processes=2"]
    code, _, err = run_command(*arguments, env=environment)
    assert code == 1
    assert err.count("Traceback") == 1 and err.count("RuntimeError: a broken package") == 1, err
    assert err.splitlines()[-1].startswith("process ") and err.endswith(" of 2 ended with code 1\n")


def test_the_run_folder_is_locked_and_a_killed_worker_ends_the_run(refuses, monkeypatch, tiny_run, tmp_path):
    overrides = ("train.train_steps=100000", "train.save_every_steps=50000", "train.validate_every_steps=50000")
    first = command("pretrain", tiny_run.recipe, f"runs_folder={tmp_path}", "parallel.num_processes=2", *overrides)
    try:
        deadline = time.monotonic() + 150
        metrics = tmp_path / "tiny" / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            assert first.poll() is None and time.monotonic() < deadline, first.communicate(timeout=5)
            time.sleep(0.2)
        workers = psutil.Process(first.pid).children()
        assert len(workers) == 2
        worker_by_rank = {worker.environ()["RANK"]: worker for worker in workers}
        with monkeypatch.context() as patch:
            patch.setenv("WORLD_SIZE", "1")
            patch.setenv("RANK", "0")
            refuses(
                ["pretrain", tiny_run.recipe, f"runs_folder={tmp_path}", "train.train_steps=100000"],
                f"{tmp_path / 'tiny'} is in use by another run (process {worker_by_rank['0'].pid}): wait for it",
            )
        worker_by_rank["1"].kill()
        _, err = first.communicate(timeout=30)
    finally:
        first.kill()
    assert first.returncode == 1
    assert err.splitlines()[-1] == "process 1 of 2 ended with signal SIGKILL"
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
