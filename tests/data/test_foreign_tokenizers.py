"""Tokenizers of every kind load without their code, copy for transformers, and work in preparation and training."""

import json
import shutil
from dataclasses import replace

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast
from transformers import AutoTokenizer

from moonlight.data.prepare import prepare
from moonlight.data.tokenizer import Tokenizer
from moonlight.data.tokenizer_files import copy_tokenizer, tokenizer_files
from moonlight.errors import UserError
from moonlight.files import sha256_checksum
from moonlight.train.run_folder import check_data
from tests.support.layouts import recipe
from tests.support.texts import TEXTS

KINDS = {
    "tokenizer_folder": "tokenizer.model",
    "tiktoken_folder": "tiktoken.model",
    "fast_folder": "tokenizer.json",
    "llama_folder": "tokenizer.json",
}


@pytest.fixture(scope="session")
def llama_folder(small_corpus, fast_folder, tmp_path_factory):
    """A SentencePiece model that puts a space before text, next to a tokenizer.json."""
    folder = shutil.copytree(fast_folder, tmp_path_factory.mktemp("llama") / "small")
    files = ",".join(map(str, sorted(small_corpus.iterdir())))
    sentencepiece.SentencePieceTrainer.train(
        input=files, model_prefix=str(folder / "tokenizer"), vocab_size=500, byte_fallback=True, minloglevel=2
    )
    return folder


@pytest.fixture(params=KINDS)
def kind(request):
    return request.getfixturevalue(request.param), KINDS[request.param]


@pytest.fixture
def broken(fast_folder, tmp_path):
    """A copy of the fast tokenizer's folder for the test to change."""
    return shutil.copytree(fast_folder, tmp_path / "broken")


def change_config(folder, **changes):
    """Set keys of tokenizer_config.json; None removes one."""
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.sampled_from([*TEXTS, "<|endoftext|>[CLS]", "a<tool_call>b", "long " * 40]))
def test_fast_ids_equal_those_of_its_file(fast_folder, text):
    """No truncation, padding, [CLS] or control id, even though the file requests them."""
    ours, plain = Tokenizer.load(fast_folder), Fast.from_file(str(fast_folder / "tokenizer.json"))
    plain.no_truncation()
    plain.no_padding()
    letters = text.replace("<|endoftext|>", "").replace("[CLS]", "")
    if letters == text:
        assert ours.encode(text) == plain.encode(text, add_special_tokens=False).ids
    assert {1500, 1501}.isdisjoint(ours.encode(text))


def test_fast_ids(fast_folder):
    ours = Tokenizer.load(fast_folder)
    assert (ours.eos_id, ours.bos_id, ours.eos_token) == (1500, 1501, "<|endoftext|>")
    assert ours.encode("<tool_call>") == [1502], "an added token that is not special is text"
    assert ours.num_ids == ours.num_text_ids == 1503
    assert ours.decode([1501, *ours.encode("cafe\u0301"), 1500]) == "caf\u00e9"


def test_the_file_that_defines_the_tokenizer(kind):
    folder, file = kind
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.file == file
    assert tokenizer.sha256 == sha256_checksum(folder / file)


def test_a_copy_loads_without_remote_code(kind, tmp_path):
    folder, _ = kind
    copy_tokenizer(folder, tmp_path / "out")
    ours, copy = Tokenizer.load(folder), Tokenizer.load(tmp_path / "out")
    plain = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False, split_special_tokens=True)
    assert (copy.sha256, copy.num_ids, copy.num_text_ids) == (ours.sha256, ours.num_ids, ours.num_text_ids)
    assert plain.eos_token_id == copy.eos_id == ours.eos_id and copy.bos_id == ours.bos_id
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    for text in TEXTS:
        ids = plain(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == copy.encode(text) == ids
    copy_tokenizer(tmp_path / "out", tmp_path / "again")
    for name in tokenizer_files(tmp_path / "out"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_our_own_files_are_copied_unchanged(tokenizer_folder, tmp_path):
    copy_tokenizer(tokenizer_folder, tmp_path / "out")
    names = tokenizer_files(tokenizer_folder)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    assert {"tokenizer.model", "tokenizer.json", "chat_template.jinja"} <= set(names)
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tokenizer_folder / name).read_bytes()


def test_a_copy_keeps_ids_that_the_tokenizer_class_would_change(broken, tmp_path):
    change_config(broken, tokenizer_class="Qwen2Tokenizer", auto_map=None, eos_token="<|endoftext|>")
    text = "it's  a\n\n  test of 1234567 caf\u00e9\n\tx"
    ids = Tokenizer.load(broken).encode(text)
    assert AutoTokenizer.from_pretrained(broken)(text, add_special_tokens=False)["input_ids"] != ids
    copy_tokenizer(broken, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text, add_special_tokens=False)["input_ids"] == ids


@pytest.mark.parametrize("value", [1500, [1500, 1501]])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_end_of_text_from_the_model_files(broken, tmp_path, file, value):
    change_config(broken, eos_token=None)
    (broken / file).write_text(json.dumps({"eos_token_id": value}))
    assert Tokenizer.load(broken).eos_id == 1500
    copy_tokenizer(broken, tmp_path / "out")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == Tokenizer.load(tmp_path / "out").eos_id == 1500
    )


def test_the_end_of_text_is_special_even_if_no_file_marks_it(broken):
    change_config(broken, eos_token="<tool_call>")
    tokenizer = Tokenizer.load(broken)
    assert tokenizer.eos_id == 1502 and 1502 not in tokenizer.encode("a <tool_call>")


def unigram(folder):
    """Make the tokenizer a Unigram model that encodes the text `</s>` as its control token."""
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["</s>", 0.0], ["a", -1.0]]}
    content = json.loads((folder / "tokenizer.json").read_text())
    entry = {**content["added_tokens"][0], "id": 1, "content": "</s>"}
    plain = dict.fromkeys(("pre_tokenizer", "decoder", "post_processor"))
    (folder / "tokenizer.json").write_text(json.dumps({**content, **plain, "model": model, "added_tokens": [entry]}))
    change_config(folder, eos_token="</s>", bos_token=None)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "is not a Hugging Face fast tokenizer"),
        (
            lambda folder: (folder / "tokenizer.json").write_text("[" * 99_999),
            "tokenizer.json is corrupt: a JSON object",
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\x00"),
            "tokenizer.json is corrupt: a JSON object",
        ),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            "has no tokenizer.model, tiktoken.model or tokenizer.json",
        ),
        (lambda folder: change_config(folder, eos_token=None), "has no end-of-document id: set eos_token in its"),
        (lambda folder: change_config(folder, eos_token="nothing"), "has eos_token 'nothing': it must be one of"),
        (lambda folder: change_config(folder, eos_token=[5]), "has no end-of-document id"),
        (unigram, "gives the control id 1 to text that spells '</s>'"),
    ],
)
def test_corrupt_folders_are_refused(refuses, broken, small_corpus, tmp_path, damage, words):
    damage(broken)
    refuses(["data", "prepare", "--input", small_corpus, "--tokenizer", broken, "--out", tmp_path / "data"], words)


def test_an_end_of_text_id_outside_the_tokenizer(broken):
    change_config(broken, eos_token=None)
    (broken / "config.json").write_text('{"eos_token_id": 1503}')
    with pytest.raises(UserError, match=r"config\.json has eos_token_id 1503: it must be an id of the tokenizer"):
        Tokenizer.load(broken)


def test_sentencepiece_that_adds_spaces_needs_a_tokenizer_json(llama_folder, tmp_path):
    shutil.copy(llama_folder / "tokenizer.model", tmp_path)
    with pytest.raises(UserError, match=r"adds spaces to it: add a tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_sentencepiece_without_a_tokenizer_json_is_not_copied(tokenizer_folder, tmp_path):
    shutil.copy(tokenizer_folder / "tokenizer.model", tmp_path)
    with pytest.raises(UserError, match=r"has no tokenizer\.json: transformers needs one next to tokenizer\.model"):
        copy_tokenizer(tmp_path, tmp_path / "out")


# Preparing and training


@pytest.mark.parametrize("workers", [1, 2])
def test_prepared_data_reads_back(kind, small_corpus, tmp_path, workers):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    folder, _ = kind
    manifest = prepare([small_corpus], folder, tmp_path / "data", validation_share=0.3, workers=workers)
    tokenizer = Tokenizer.load(folder)
    assert manifest["tokenizer"]["sha256"] == tokenizer.sha256
    texts = []
    for name, split in manifest["splits"].items():
        dataset = IndexedDataset(str(tmp_path / "data" / name))
        documents = [dataset[i].tolist() for i in range(len(dataset))]
        assert split["largest_id"] == max(map(max, documents))
        assert all(ids.index(tokenizer.eos_id) == len(ids) - 1 for ids in documents)
        texts += map(tokenizer.decode, documents)
    assert sorted(texts) == sorted(file.read_bytes().decode() for file in small_corpus.iterdir())


def recipe_with_rows(folder, tokenizer, rows):
    """Return a config whose model has `rows` embedding rows."""
    config = recipe()
    data = replace(config.data, path=str(folder), tokenizer=str(tokenizer))
    return replace(config, model=replace(config.model, vocab_size=rows), data=data)


def test_unused_special_ids_need_no_rows(tiktoken_folder, small_corpus, tmp_path):
    prepare([small_corpus], tiktoken_folder, tmp_path / "data", validation_share=0.3)
    check_data(recipe_with_rows(tmp_path / "data", tiktoken_folder, 2050))
    message = "model.vocab_size is 2049: id 2049 occurs in the data .* needs at least 2050 rows"
    with pytest.raises(UserError, match=message):
        check_data(recipe_with_rows(tmp_path / "data", tiktoken_folder, 2049))


def test_every_id_that_text_can_give_needs_a_row(tokenizer_folder, tmp_path):
    for index in range(40):
        (tmp_path / f"{index}.txt").write_text(f"\t\t{index}")
    manifest = prepare([tmp_path], tokenizer_folder, tmp_path / "data", validation_share=0.3)
    rows = max(split["largest_id"] for split in manifest["splits"].values()) + 1
    assert rows < 1024
    with pytest.raises(UserError, match=f"vocab_size is {rows}: the tokenizer .* can give text any of 1024 ids"):
        check_data(recipe_with_rows(tmp_path / "data", tokenizer_folder, rows))
