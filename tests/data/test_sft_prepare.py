"""Preparing conversations: invalid ones are counted and quarantined, all others are stored in full."""

import gzip
import json

import pytest

from moonlight.data.chat_tasks import HELD_OUT_FILE, TRAIN_FILE, write_tasks
from moonlight.data.manifest import load_manifest
from moonlight.data.prepare_chat import prepare_chat
from moonlight.data.tokenizer import Tokenizer
from moonlight.errors import UserError
from tests.support.chats import CHATS

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
BAD = {
    "no assistant turn": {"messages": [USER]},
    "unknown role": {"messages": [{"role": "bot", "content": "hi"}, ASSISTANT]},
    "empty text": {"messages": [{"role": "user", "content": " \n"}, ASSISTANT]},
    "longer than the sequence": {"messages": [{"role": "user", "content": "hi! " * 300}, ASSISTANT]},
    "no messages": {"text": "hi"},
    "not a message": {"messages": ["hi", ASSISTANT]},
    "not text": {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ASSISTANT]},
    "tool calls": {"messages": [USER, {**ASSISTANT, "tool_calls": [{"name": "f"}]}]},
    "not JSON": '{"messages": ',
    "a JSON object is expected, not list": [USER, ASSISTANT],
}


def to_jsonl(*values):
    return "".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values)


@pytest.fixture(scope="module")
def prepared(tokenizer_folder, tmp_path_factory):
    """40 valid conversations, one of each invalid kind between them, and a blank line."""
    folder = tmp_path_factory.mktemp("chats")
    valid = [{"messages": messages} for messages in CHATS]
    (folder / "chats.jsonl").write_text(to_jsonl(*valid[:20], *BAD.values(), "", *valid[20:]))
    prepare_chat([folder / "chats.jsonl"], tokenizer_folder, folder / "data", sequence_length=128, validation_share=0.2)
    return folder


def test_every_bad_conversation_is_counted_and_quarantined_with_its_line(prepared):
    manifest = load_manifest(prepared / "data")
    assert manifest["bad_by_reason"] == dict.fromkeys(manifest["bad_by_reason"], 1)
    assert set(manifest["bad_by_reason"]) == set(BAD)
    assert manifest["bad_records"] == len(BAD) and manifest["empty_documents"] == 1
    quarantine = [json.loads(line) for line in (prepared / "data" / "quarantine.jsonl").read_text().splitlines()]
    assert {(entry["reason"].partition(":")[0], entry["line"]) for entry in quarantine} == {
        (kind, 21 + index) for index, kind in enumerate(BAD)
    }
    assert {entry["file"] for entry in quarantine} == {str(prepared / "chats.jsonl")}
    for kind, first in manifest["first_bad"].items():
        assert f"chats.jsonl, line {21 + list(BAD).index(kind)}: {kind}" in first


def test_the_manifest_counts_documents_tokens_and_bytes(prepared, tokenizer_folder):
    manifest, eos_id = load_manifest(prepared / "data"), Tokenizer.load(tokenizer_folder).eos_id
    splits = manifest["splits"]
    assert sum(split["documents"] for split in splits.values()) == len(CHATS) == manifest["sources"][0]["documents"]
    texts = [message["content"] for messages in CHATS for message in messages]
    assert manifest["sources"][0]["bytes"] == sum(len(text.encode()) for text in texts)
    for name, split in splits.items():
        mask = (prepared / "data" / f"{name}.mask").read_bytes()
        assert (len(mask), mask.count(1), mask.count(0) + mask.count(1)) == (
            split["tokens"],
            split["counted_tokens"],
            split["tokens"],
        )
    assert manifest["tokenizer"]["eos_id"] == eos_id
    assert manifest["chat"]["end_token"] == "<|im_end|>" and manifest["chat"]["sequence_length"] == 128
    assert (prepared / "data" / "chat_template.jinja").read_text() == (
        tokenizer_folder / "chat_template.jinja"
    ).read_text()


def test_same_bytes_for_a_rerun_any_number_of_workers_and_gzip(prepared, tokenizer_folder, tmp_path, capsys):
    lines = (prepared / "chats.jsonl").read_bytes()
    (tmp_path / "chats.jsonl.gz").write_bytes(gzip.compress(lines))
    arguments = {"sequence_length": 128, "validation_share": 0.2}
    prepare_chat([tmp_path / "chats.jsonl.gz"], tokenizer_folder, tmp_path / "data", workers=2, **arguments)
    for name in ("bin", "idx", "mask"):
        for split in ("train", "validation"):
            file = f"{split}.{name}"
            assert (tmp_path / "data" / file).read_bytes() == (prepared / "data" / file).read_bytes()
    capsys.readouterr()
    prepare_chat([prepared / "chats.jsonl"], tokenizer_folder, prepared / "data", **arguments)
    assert "have been prepared already" in capsys.readouterr().out
    with pytest.raises(UserError, match="already exists with different content"):
        prepare_chat([prepared / "chats.jsonl"], tokenizer_folder, prepared / "data", sequence_length=129)


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        (to_jsonl(*BAD.values()), {}, r"the inputs hold no documents \(10 records, 0 of them empty, 10 of them bad, "),
        (to_jsonl({"messages": CHATS[0]}, *BAD.values()), {"max_bad_share": 0.5}, r"10 of 11 records \(90.91%\)"),
        (to_jsonl({"messages": CHATS[0]}), {}, "no document of .* falls into"),
        (to_jsonl({"messages": CHATS[0]}), {"sequence_length": 1}, "sequence_length is 1"),
        (to_jsonl({"messages": CHATS[0]}), {"template": "mine"}, "template is 'mine'"),
        (to_jsonl({"messages": CHATS[0]}), {"sequence_length": 8}, "longer than the sequence: .* tokens, 8 fit"),
    ],
)
def test_refused(lines, arguments, message, tokenizer_folder, tmp_path):
    (tmp_path / "chats.jsonl").write_text(lines)
    with pytest.raises(UserError, match=message):
        prepare_chat(
            [tmp_path / "chats.jsonl"], tokenizer_folder, tmp_path / "data", **({"sequence_length": 128} | arguments)
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl"]


def test_other_files_are_refused(tokenizer_folder, tmp_path):
    (tmp_path / "chats.txt").write_text("hi")
    with pytest.raises(UserError, match=r"chats\.txt holds no conversations: a \.jsonl"):
        prepare_chat([tmp_path / "chats.txt"], tokenizer_folder, tmp_path / "data", sequence_length=128)


@pytest.mark.parametrize("name", ["train.mask", "validation.mask", "train.idx"])
def test_a_truncated_file_is_detected(prepared, tmp_path, name):
    import shutil

    shutil.copytree(prepared / "data", tmp_path / "data")
    path = tmp_path / "data" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{name} is corrupt"):
        load_manifest(tmp_path / "data")


def right_answer(question):
    """Return the answer to a question of `chat_tasks`, computed from its words."""
    if question.endswith(" ="):
        return str(eval(question[:-2]))
    task, _, rest = question.partition(": ")
    return {
        "Repeat": lambda: rest,
        "Last word": lambda: rest.rsplit(" ", 1)[-1],
        "Last letter": lambda: rest[-1],
        "How many words": lambda: str(rest.count(" ") + 1),
        "Larger": lambda: str(max(map(int, rest.split(" or ")))),
    }[task]()


def test_tasks_have_right_answers_and_disjoint_parts(tmp_path):
    assert write_tasks(tmp_path / "tasks", 800, 200, seed=3)
    assert not write_tasks(tmp_path / "tasks", 800, 200, seed=3)
    questions = {}
    for name, count in ((TRAIN_FILE, 800), (HELD_OUT_FILE, 200)):
        lines = [json.loads(line) for line in (tmp_path / "tasks" / name).read_text().splitlines()]
        assert len(lines) == count
        assert {1, 2, 3} == {sum(m["role"] == "user" for m in line["messages"]) for line in lines}
        assert len({line["task"] for line in lines}) == 6
        questions[name] = set()
        for line in lines:
            turns = [message for message in line["messages"] if message["role"] != "system"]
            for asked, answered in zip(turns[::2], turns[1::2], strict=True):
                assert (asked["role"], answered["role"]) == ("user", "assistant")
                assert answered["content"] == right_answer(asked["content"])
                words = asked["content"].split()
                numbers_alone = words[0] == "Larger:" or words[-1] == "="  # these have the same meaning in any order
                questions[name].add(" ".join(sorted(words) if numbers_alone else words))
    assert not questions[TRAIN_FILE] & questions[HELD_OUT_FILE]
    write_tasks(tmp_path / "again", 800, 200, seed=3)
    assert (tmp_path / "again" / TRAIN_FILE).read_bytes() == (tmp_path / "tasks" / TRAIN_FILE).read_bytes()
