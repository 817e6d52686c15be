"""Bits per byte of held-out text through transformers equals the run's own result; the model card has the table."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from checkpoints.card import missing_card_parts
from checkpoints.card_evaluation import fill_card, with_evaluation
from checkpoints.export import export
from checkpoints.release import check_release
from eval.evaluate import EvalOptions, evaluate
from moonlight.data.prepare import prepare
from moonlight.data.prepare_chat import prepare_chat
from moonlight.errors import UserError
from moonlight.files import SUMS_FILE, VERIFICATION_FILE, check_sums, sha256_checksum
from moonlight.train.metrics import read_metrics
from tests.support.chats import write_chats
from tests.support.evaluations import write_dense


@pytest.fixture
def folder(ready_export, tmp_path):
    return shutil.copytree(ready_export, tmp_path / "runs" / "hf")


def options(*data, **settings):
    return EvalOptions(suite="heldout", data=data, **settings)


def test_bits_per_byte_equal_the_runs_own(folder, tiny_run, tmp_path):
    output = evaluate([folder], options(tiny_run.data), tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "runs" / "data.json").read_text())
    last = read_metrics(tiny_run.folder)[-1]
    assert entry["loss"] == pytest.approx(last["loss/held_out"], abs=1e-5)
    assert entry["score"] == pytest.approx(last["bits_per_byte/held_out"], abs=1e-5)
    manifest = json.loads((tiny_run.data / "manifest.json").read_text())["splits"]["validation"]
    gzip = 8 * manifest["gzip_bytes"] / manifest["compressed_text_bytes"]
    assert f"| data | {manifest['bytes']:,} | {entry['score']:.3f} | {gzip:.3f} |" in output.table


def test_the_batch_size_does_not_change_the_score(folder, tiny_run, tmp_path):
    scores = []
    for size in (1, 7):
        evaluate([folder], replace(options(tiny_run.data), batch_size=size), tmp_path / str(size))
        scores.append(json.loads((tmp_path / str(size) / "runs" / "data.json").read_text())["score"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_a_dense_model_on_data_of_its_tokenizer(tmp_path, tokenizer_folder, data_folder):
    model = write_dense(tmp_path / "llama", "llama", tokenizer_folder)
    evaluate([model], EvalOptions(suite="heldout", data=(data_folder,)), tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "llama" / "small.json").read_text())
    assert entry["sequence_length"] == 128 and 2 < entry["score"] < 20


def test_invalid_data_is_refused(folder, tmp_path, small_corpus, tokenizer_folder, tiktoken_folder, refuses):
    prepare([small_corpus], tiktoken_folder, tmp_path / "other", validation_share=0.1)
    prepare([small_corpus], tokenizer_folder, tmp_path / "none", validation_share=0.0)
    command = ["eval", folder, "--suite", "heldout", "--data"]
    refuses([*command, tmp_path / "other"], "prepared with the tokenizer of checksum", "give the same tokenizer")
    refuses([*command, tmp_path / "none"], "no held-out documents", "--validation-share")
    refuses([*command, tmp_path / "nowhere"], "nowhere", "moonlight data prepare")
    chats = write_chats(tmp_path / "chats.jsonl")
    prepare_chat([chats], tokenizer_folder, tmp_path / "chats", sequence_length=128, validation_share=0.2)
    refuses([*command, tmp_path / "chats"], "chats holds conversations", "a folder of text")
    valid = tmp_path / "fitting"
    prepare([small_corpus], tokenizer_folder, valid, validation_share=0.1)
    refuses([*command, valid, "--sequence-length", "65"], "--sequence-length is 65", "from 1 to the 64 of")
    refuses([*command, valid, "--sequence-length", "0"], "--sequence-length is 0")


TABLE = "| benchmark | tiny |\n|---|---:|\n| MMLU | 25.0 |\n\n- A note.\n"


def test_results_fill_the_card_and_the_export_stays_valid(folder, tmp_path):
    from PIL import Image

    plot = tmp_path / "curve.png"
    Image.new("RGB", (60, 40)).save(plot)
    before = (folder / "README.md").read_text()
    fill_card(folder, "paper", TABLE, plot)
    fill_card(folder, "heldout", "| text | tiny |\n|---|---:|\n| data | 3.0 |\n", None)
    text = (folder / "README.md").read_text()
    assert "| MMLU | 25.0 |" in text and "| data | 3.0 |" in text and "(evaluation-paper.png)" in text
    assert text.index("## Results") < text.index("### Evaluation") < text.index("| MMLU") < text.index("## Limitations")
    assert not missing_card_parts(text)
    check_sums(folder)
    check_release(folder, "moon/tiny")
    # Other results of the same suite replace the first ones.
    fill_card(folder, "paper", TABLE.replace("25.0", "26.0"), plot)
    refilled = (folder / "README.md").read_text()
    assert refilled == text.replace("25.0", "26.0")
    old_lines = [line for line in before.splitlines() if line]
    assert [line for line in refilled.splitlines() if line and line in old_lines] == old_lines


def test_an_invalid_verification_stays_invalid(folder):
    verification = json.loads((folder / VERIFICATION_FILE).read_text())
    (folder / VERIFICATION_FILE).write_text(json.dumps(verification | {"sums_sha256": "0" * 64}))
    fill_card(folder, "paper", TABLE, None)
    assert (
        json.loads((folder / VERIFICATION_FILE).read_text())["sums_sha256"]
        == "0" * 64
        != sha256_checksum(folder / SUMS_FILE)
    )


def test_an_edited_card_is_not_changed(folder):
    with (folder / "README.md").open("a") as card:
        card.write("My own words.\n")
    with pytest.raises(UserError, match=re.escape("does not match its checksum in SHA256SUMS")):
        fill_card(folder, "paper", TABLE, None)


def test_an_existing_table_is_kept():
    card = "# Tiny\n\n## Results\n\n### Evaluation\n\nBy hand.\n\n## Limitations\n\nNone.\n"
    text = with_evaluation(card, "paper", TABLE)
    assert text.index("By hand.") < text.index("| MMLU")
    assert text.count("### Evaluation") == text.count("## Limitations") == 1
    bare = with_evaluation("# Tiny\n\nText.\n\n## Limitations\n\nNone.\n", "paper", TABLE)
    assert bare.index("Text.") < bare.index("## Results") < bare.index("### Evaluation") < bare.index("## Limitations")


def test_the_command_evaluates_and_fills_the_cards(folder, tiny_run, tmp_path, monkeypatch, capfd):
    """For two checkpoints, `eval --card` writes a table and a curve into both cards; a rerun skips the evaluation."""
    from moonlight.cli.main import main

    earlier = tmp_path / "step-2"
    export(tiny_run.folder, earlier, revision_step=2)
    command = ["eval", folder, earlier, "--suite", "heldout", "--data", tiny_run.data, "--card"]
    monkeypatch.setattr("sys.argv", ["moonlight", *map(str, command)])
    for again in (False, True):
        with pytest.raises(SystemExit) as exit_info:
            main()
        assert not exit_info.value.code
        out = capfd.readouterr().out
        assert "| held-out text | bytes | runs | step-2 |" in out and out.count("README.md: table added") == 2
        assert out.count("already evaluated") == (2 if again else 0)
    place = tmp_path / "runs" / "evaluation" / "heldout"
    assert (place / "results.json").is_file()
    for one in (folder, earlier):
        card = (one / "README.md").read_text()
        assert card.count("| held-out text | bytes | runs | step-2 |") == 1 and "(evaluation-heldout.png)" in card
        assert (one / "evaluation-heldout.png").read_bytes() == (place / "curve.png").read_bytes()
        check_sums(one)
