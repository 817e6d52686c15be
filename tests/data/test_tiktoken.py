"""Tiktoken tokenizers, as Moonlight's: ids equal the tiktoken package's, without it and without remote code."""

import json
import shutil
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moonlight.data.tiktoken_bpe import convert_tiktoken, fast_tokenizer
from moonlight.data.tokenizer import Tokenizer
from moonlight.errors import UserError
from moonlight.files import sha256_checksum
from tests.support.foreign_tokenizers import SPECIAL_OFFSETS, reference, write_ranks, write_tiktoken
from tests.support.texts import MESSAGES, RENDERED, TEXTS

SNIPPETS = st.sampled_from(
    [
        *(
            "月光照在河面上",
            "漢字かな交じり文",
            "한국어",
            "Луна",
            "Straße",
            "e\u0301",
            "\u0301",
            "ǅ",
            "ʰ",
            "𠀀",
            "\u2581",
            "\u00a0",
        ),
        *(
            "'s",
            "'T",
            "'re",
            "'VE",
            "'m",
            "'Ll",
            "'d",
            "'\u017f",
            "\u2019s",
            "don't",
            "WE'RE",
            "HTTPServer",
            "camelCase",
        ),
        *("0", "12", "123", "1234567", "٣", "Ⅷ", "½", ".", "!?", "->", "))", "…", "—"),
        *(
            " ",
            "  ",
            "\t",
            "\n",
            "\r\n",
            "\n\n\n",
            " \n ",
            "\u2028",
            "\x85",
            "\x00",
            "👨‍👩‍👧",
            "🏳️‍🌈",
            "\ufffd",
            "\U0010ffff",
        ),
        *SPECIAL_OFFSETS,
        "<|reserved_token_2056|>",
        "return self.",
    ]
)
ANY_TEXT = st.lists(SNIPPETS | st.text(max_size=6)).map("".join)


@lru_cache
def engines(folder):
    return Tokenizer.load(folder), reference(folder)


@lru_cache
def converted(folder, out):
    convert_tiktoken(folder, out)
    plain = AutoTokenizer.from_pretrained(out)
    return plain, AutoTokenizer.from_pretrained(out, split_special_tokens=False)


@pytest.fixture(scope="session")
def served(tiktoken_folder, tmp_path_factory):
    """The converted folder as plain transformers loads it: one tokenizer for text, one for rendered chats."""
    return converted(tiktoken_folder, tmp_path_factory.mktemp("converted") / "out")


def check_text(folder, served, text):
    ours, peer = engines(folder)
    plain, chat = served
    ids = peer.encode_ordinary(text)
    assert ours.encode(text) == ids
    assert plain(text)["input_ids"] == ids
    assert chat(text)["input_ids"] == peer.encode(text, allowed_special="all")
    assert ours.decode(ids) == plain.decode(ids) == text


@settings(max_examples=500, deadline=None)
@given(text=ANY_TEXT)
def test_ids_of_any_text(tiktoken_folder, served, text):
    check_text(tiktoken_folder, served, text)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_of_awkward_text(tiktoken_folder, served, text):
    check_text(tiktoken_folder, served, text)


def test_ids_of_whole_files(tiktoken_folder, served, small_corpus):
    for file in sorted(small_corpus.iterdir()):
        check_text(tiktoken_folder, served, file.read_bytes().decode())


def check_characters(folder, *planes):
    """Check that both libraries split each character alike, next to letters, digits, spaces and punctuation."""
    ours, peer = engines(folder)
    characters = [chr(code) for plane in planes for code in plane]
    for start in range(0, len(characters), 4096):
        text = "".join(f"a{c}B {c}{c}7'{c}x{c}'s.{c}\n" for c in characters[start : start + 4096])
        assert ours.encode(text) == peer.encode_ordinary(text), hex(ord(characters[start]))


def test_every_character_of_alphabets(tiktoken_folder):
    """Ids are equal for all scripts without ideographs, and for symbols."""
    check_characters(tiktoken_folder, range(0x3400))


@pytest.mark.slow
def test_every_character(tiktoken_folder):
    """Ids are equal for all assigned planes."""
    check_characters(tiktoken_folder, range(0xD800), range(0xE000, 0x34000), range(0xE0000, 0xE0200))


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_table_of_ranks(data, tmp_path_factory):
    check_table_of_ranks(data, tmp_path_factory)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_many_tables_of_ranks(data, tmp_path_factory):
    check_table_of_ranks(data, tmp_path_factory)


def check_table_of_ranks(data, tmp_path_factory):
    """Check ids for random tokens, some of which no sequence of merges produces."""
    words = st.lists(st.text("ab ", min_size=2, max_size=6).map(str.encode), unique=True, max_size=12)
    tokens = data.draw(st.permutations([*(bytes([byte]) for byte in range(256)), *data.draw(words)]))
    folder = write_tiktoken(tmp_path_factory.mktemp("ranks") / "t", None, {token: i for i, token in enumerate(tokens)})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    ours, peer = fast_tokenizer(folder, config), reference(folder)
    for text in data.draw(st.lists(st.text("ab ", max_size=30), min_size=20, max_size=20)):
        assert ours.encode(text).ids == peer.encode_ordinary(text)


def test_a_word_too_long_for_the_pattern(tiktoken_folder):
    """A match of more than ten million steps gives an error: the library's regex engine, Oniguruma, stops there."""
    with pytest.raises(UserError, match=r"a document of 12000000 characters, 'A+'\.\.\., cannot be split into words"):
        Tokenizer.load(tiktoken_folder).encode("A" * 12_000_000)


def test_special_ids(tiktoken_folder, served):
    ours, peer = engines(tiktoken_folder)
    _, chat = served
    assert ours.num_ids == len(chat) == peer.n_vocab == 2048 + 256
    assert (ours.bos_id, ours.eos_id, ours.eos_token, ours.num_text_ids) == (2048, 2049, "[EOS]", 2050)
    assert (chat.bos_token_id, chat.eos_token_id, chat.unk_token_id, chat.pad_token_id) == (2048, 2049, 2302, 2303)
    for index in range(2048, ours.num_ids):
        assert chat.convert_ids_to_tokens(index).encode() == peer.decode_single_token_bytes(index)
        assert chat.decode([index], skip_special_tokens=True) == ours.decode([index]) == ""
    assert ours.sha256 == sha256_checksum(tiktoken_folder / "tiktoken.model")


def test_chat(tiktoken_folder, served):
    _, peer = engines(tiktoken_folder)
    _, chat = served
    assert chat.apply_chat_template(MESSAGES, tokenize=False) == RENDERED
    ids = chat.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert ids == peer.encode(f"{RENDERED}<|im_assistant|>assistant<|im_middle|>", allowed_special="all")


@pytest.mark.parametrize("place", ["file", "config"])
def test_a_chat_template_of_the_folder_is_kept(tiktoken_folder, tmp_path, place):
    source = shutil.copytree(tiktoken_folder, tmp_path / "source")
    template = "{{- messages[0]['content'] ~ '<|im_end|>' -}}"
    if place == "file":
        (source / "chat_template.jinja").write_text(template)
    else:
        config = json.loads((source / "tokenizer_config.json").read_text())
        (source / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    convert_tiktoken(source, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x<|im_end|>"


def test_no_template_if_its_markers_are_text(tiktoken_folder, tmp_path):
    source = shutil.copytree(tiktoken_folder, tmp_path / "source")
    path = source / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<|im_middle|>", "<|sep|>"))
    convert_tiktoken(source, tmp_path / "out")
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def in_config(change):
    def edit(folder):
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return edit


def in_lines(change):
    def edit(folder):
        path = folder / "tiktoken.model"
        lines = path.read_text().splitlines()
        change(lines)
        path.write_text("\n".join(lines))

    return edit


def repeat_token(config):
    config["added_tokens_decoder"]["2060"] = {"content": "[EOS]"}


@pytest.mark.parametrize(
    "damage, words",
    [
        (in_lines(lambda lines: lines.insert(4, "no base64! 7")), "line 5 is not a token in base64 and its rank"),
        (in_lines(lambda lines: lines.insert(4, "AAAA")), "line 5 is not a token in base64 and its rank"),
        (in_lines(lambda lines: lines.insert(4, "AAAA seven")), "line 5 is not a token in base64 and its rank"),
        (in_lines(lambda lines: lines.insert(4, lines[0])), "line 5 repeats the token b"),
        (in_lines(lambda lines: lines.pop(300)), " is missing"),
        (in_lines(lambda lines: lines.append("/////w== 17")), "rank 17 occurs twice"),
        (lambda folder: write_ranks(folder / "tiktoken.model", {b"a": 0}), "it has no token for the byte 0x00"),
        (lambda folder: (folder / "tiktoken.model").write_bytes(b""), "it has no token for the byte 0x00"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "names no special tokens"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "is corrupt: a JSON object is expected"),
        (in_config(lambda config: config.update(added_tokens_decoder={"5": {"content": "x"}})), "has '5' in added_tok"),
        (
            in_config(lambda config: config.update(added_tokens_decoder={"9" * 20: {"content": "x"}})),
            "it must be an id from",
        ),
        (in_config(lambda config: config.update(added_tokens_decoder={"2048": {}})), "has '2048' in added_tokens"),
        (in_config(repeat_token), "gives two ids to '[EOS]'"),
        (in_config(lambda config: config.update(eos_token="</s>")), "has eos_token '</s>'"),
        (in_config(lambda config: config.pop("eos_token")), "has no end-of-document id"),
    ],
)
def test_corrupt_folders_are_refused(refuses, tiktoken_folder, small_corpus, tmp_path, damage, words):
    folder = shutil.copytree(tiktoken_folder, tmp_path / "tokenizer")
    damage(folder)
    refuses(["data", "prepare", "--input", small_corpus, "--tokenizer", folder, "--out", tmp_path / "data"], words)
