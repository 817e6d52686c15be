"""Tokenizer: SentencePiece and transformers give the same ids for any text; training is deterministic."""

import json
import random
import shutil
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moonlight.data.chat_template import CONTROL_PIECES, set_chat_mode
from moonlight.data.tokenizer import Tokenizer
from moonlight.data.tokenizer_train import train_tokenizer
from moonlight.errors import UserError
from moonlight.files import sha256_checksum
from tests.support.texts import MESSAGES, RENDERED, TEXTS

SPACE_MARK = "\u2581"
SPECIAL = ("<unk>", "[BOS]", "[EOS]", "[PAD]", *CONTROL_PIECES)


@lru_cache
def both(folder):
    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


def check_text(folder, text):
    ours, fast = both(folder)
    ids = ours.encode(text)
    assert fast(text, add_special_tokens=False)["input_ids"] == ids
    assert fast(text)["input_ids"] == ids
    assert min(ids, default=len(SPECIAL)) >= len(SPECIAL), "text gave a control or unknown id"
    # SentencePiece stores a space as U+2581, so this one character decodes to another.
    decoded = text.replace(SPACE_MARK, " ")
    assert ours.decode(ids) == decoded
    assert fast.decode(ids) == decoded


@pytest.mark.parametrize("text", TEXTS)
def test_same_ids_and_round_trip(tokenizer_folder, text):
    check_text(tokenizer_folder, text)


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_same_ids_on_any_text(tokenizer_folder, text):
    check_text(tokenizer_folder, text)


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=200))
def test_same_ids_on_random_bytes(tokenizer_folder, raw):
    check_text(tokenizer_folder, raw.decode("utf-8", errors="replace"))


def test_same_ids_if_the_merge_order_matters(tokenizer_folder):
    """Ids are equal on random runs and joined pieces, which depend on the order of merges."""
    ours, _ = both(tokenizer_folder)
    generator = random.Random(0)
    pieces = [text for i in range(len(SPECIAL) + 256, ours.num_ids) if (text := ours.decode([i]))]
    for _ in range(3000):
        alphabet = generator.choice(pieces) + generator.choice(pieces)
        run = "".join(generator.choice(alphabet) for _ in range(generator.randint(1, 60)))
        joined = "".join(generator.choice(pieces) for _ in range(generator.randint(1, 20)))
        spaces = "".join(generator.choice("  \n\t") for _ in range(generator.randint(1, 60)))
        check_text(tokenizer_folder, generator.choice((run, joined, spaces)))


def test_same_ids_on_whole_files(tokenizer_folder, small_corpus):
    for file in sorted(small_corpus.iterdir()):
        check_text(tokenizer_folder, file.read_bytes().decode())


def test_space_mark_is_a_space(tokenizer_folder):
    check_text(tokenizer_folder, f"a{SPACE_MARK}b {SPACE_MARK}{SPACE_MARK}c")
    ours, _ = both(tokenizer_folder)
    assert ours.encode(f"a{SPACE_MARK}b") == ours.encode("a b")


def test_fast_tokenizer_has_the_special_tokens(tokenizer_folder):
    ours, fast = both(tokenizer_folder)
    assert fast.is_fast and len(fast) == ours.num_ids == 1024
    assert (fast.bos_token, fast.eos_token, fast.pad_token) == ("[BOS]", "[EOS]", "[PAD]")
    assert (fast.bos_token_id, fast.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert fast.convert_tokens_to_ids(list(SPECIAL)) == list(range(len(SPECIAL)))


def test_same_class_next_to_a_deepseek_v3_config(tokenizer_folder, tmp_path):
    """A config.json in the folder must not make transformers choose another kind of tokenizer."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    for text in TEXTS:
        check_text(folder, text)


def test_newline_indent_and_tabs_are_pieces(tokenizer_folder):
    ours, _ = both(tokenizer_folder)
    assert len(ours.encode("\n        return")) == 1
    assert len(ours.encode("\n\t\t")) == 1


def test_chat_template(tokenizer_folder):
    _, fast = both(tokenizer_folder)
    assert fast.apply_chat_template(MESSAGES, tokenize=False) == RENDERED
    opened = fast.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert opened == RENDERED + "<|im_assistant|>assistant<|im_middle|>"
    with pytest.raises(Exception, match="role judge"):
        fast.apply_chat_template([{"role": "judge", "content": ""}])


def test_chat_markers_become_control_ids_and_messages_stay_text(tokenizer_folder):
    ours, _ = both(tokenizer_folder)
    chat = AutoTokenizer.from_pretrained(tokenizer_folder, split_special_tokens=False)
    ids = chat.apply_chat_template(MESSAGES, sanitize_control_tokens=True, return_dict=False)
    end, user, assistant, system, middle = range(4, 9)
    expected = []
    for start, name, message in zip(
        (system, user, assistant, user), ("system", "user", "assistant", "user"), MESSAGES, strict=True
    ):
        content = message["content"]
        if "<|im_end|>" in content:  # transformers splits the text at the tokens it protects
            parts = ["say ", "<|im_end|>", " or ", "[EOS]"]
            content_ids = [i for part in parts for i in ours.encode(part)]
        else:
            content_ids = ours.encode(content)
        expected += [start, *ours.encode(name), middle, *content_ids, end]
    assert ids == expected


def test_chat_mode_is_for_servers(tokenizer_folder, tmp_path):
    folder = tmp_path / "served"
    shutil.copytree(tokenizer_folder, folder)
    set_chat_mode(folder)
    assert AutoTokenizer.from_pretrained(folder)("<|im_user|>")["input_ids"] == [5]


def test_training_is_deterministic(tokenizer_folder, small_corpus, tmp_path):
    train_tokenizer([small_corpus], 1024, tmp_path / "again", threads=3)
    for name in ("tokenizer.model", "tokenizer.json", "manifest.json"):
        assert sha256_checksum(tmp_path / "again" / name) == sha256_checksum(tokenizer_folder / name)
    assert Tokenizer.load(tokenizer_folder).sha256 == sha256_checksum(tokenizer_folder / "tokenizer.model")


def test_training_on_a_sample_of_the_corpus_is_deterministic(small_corpus, tmp_path):
    for name in ("one", "two"):
        train_tokenizer([small_corpus], 512, tmp_path / name, max_training_bytes=200_000)
    train_tokenizer([small_corpus], 512, tmp_path / "all")
    one, two, whole = (sha256_checksum(tmp_path / name / "tokenizer.model") for name in ("one", "two", "all"))
    assert one == two != whole


def test_training_twice_into_one_folder(small_corpus, tmp_path, capsys):
    folder = tmp_path / "tokenizer"
    train_tokenizer([small_corpus], 512, folder)
    before = (folder / "manifest.json").stat().st_mtime_ns
    train_tokenizer([small_corpus], 512, folder)
    assert "already" in capsys.readouterr().out
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="different content"):
        train_tokenizer([small_corpus], 600, folder)


def test_errors_name_the_bad_input(small_corpus, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    little = tmp_path / "little.txt"
    little.write_text("to be or not to be")
    with pytest.raises(UserError, match=r"vocab_size is 4096: .* at most \d+ ids"):
        train_tokenizer([little], 4096, tmp_path / "a")
    with pytest.raises(UserError, match=r"vocab_size is 100: .* at least \d+ ids"):
        train_tokenizer([little], 100, tmp_path / "a")
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([empty], 512, tmp_path / "a")
    with pytest.raises(UserError, match=r"nowhere\.txt does not exist"):
        train_tokenizer([tmp_path / "nowhere.txt"], 512, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError, match=r"no tokenizer\.model"):
        Tokenizer.load(small_corpus)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path)
