"""Importing a bad Hugging Face folder gives one line, exit code 2 and no files, and never runs the folder's code."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints.export import export
from checkpoints.hf_import import import_folder
from moonlight.files import write_sums
from tests.support.bad_input import check_line, run_command
from tests.support.hugging_face import change_config, change_tensors, raw_tensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@pytest.fixture
def sharded(small_models, tmp_path):
    return Path(shutil.copytree(small_models / "sharded", tmp_path / "hf"))


# The files


def change_index(folder, change):
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def test_a_missing_shard(sharded, import_refused):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    import_refused(sharded, f"{sharded} lacks {shard.name}, which {INDEX} names: download or export the folder again")


def test_an_index_that_names_an_absent_file(sharded, import_refused):
    change_index(sharded, lambda owners: owners.update({"lm_head.weight": "other.safetensors"}))
    import_refused(sharded, f"{sharded} lacks other.safetensors, which {INDEX} names")


def test_an_index_that_names_a_tensor_missing_from_its_file(sharded, import_refused):
    first = sorted(sharded.glob("*.safetensors"))[0].name
    change_index(sharded, lambda owners: owners.update({"lm_body.weight": first}))
    import_refused(sharded, f"{sharded / first} lacks lm_body.weight, which {INDEX} places there")


def test_an_index_that_names_the_wrong_file(sharded, import_refused):
    first, *_, last = sorted(file.name for file in sharded.glob("*.safetensors"))
    change_index(sharded, lambda owners: owners.update({"lm_head.weight": last}))
    import_refused(sharded, f"{INDEX} places lm_head.weight in {last}, it is in {first}")


def test_an_index_that_omits_a_tensor(sharded, import_refused):
    change_index(sharded, lambda owners: owners.pop("lm_head.weight"))
    import_refused(sharded, f"{INDEX} places lm_head.weight in no file, it is in ")


def test_a_tensor_in_two_files(sharded, import_refused):
    first, *_, last = sorted(sharded.glob("*.safetensors"))
    save_file(load_file(last) | {"lm_head.weight": load_file(first)["lm_head.weight"]}, last)
    import_refused(sharded, f"lm_head.weight is in {first} and in {last}: it must be in one file")


@pytest.mark.parametrize(
    "name",
    [
        *("../../etc/x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", ".safetensors"),
        *("x\0.safetensors", "x\n.safetensors", "\x1b[2Jx.safetensors", "x.bin", "", "\ud800.safetensors"),
    ],
)
def test_an_index_that_names_a_path_outside_the_folder(sharded, import_refused, name):
    change_index(sharded, lambda owners: owners.update({"lm_head.weight": name}))
    import_refused(sharded, f"{sharded / INDEX} names {name!r}: it must be a safetensors file in the folder")


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000])
def test_an_index_with_a_name_too_long(sharded, import_refused, name):
    change_index(sharded, lambda owners: owners.update({"lm_head.weight": f"{name}.safetensors"}))
    import_refused(sharded, "xxx.safetensors: File name too long; choose a shorter name")


@pytest.mark.parametrize(
    "content, words",
    [
        ("", f"{INDEX} is corrupt: it is not a JSON object"),
        ("{}", f"{INDEX} is corrupt: it has no weight_map from tensors to files"),
        ('{"weight_map": {}}', f"{INDEX} is corrupt: it has no weight_map from tensors to files"),
        ('{"weight_map": []}', f"{INDEX} is corrupt: it has no weight_map from tensors to files"),
        ('{"weight_map": {"a": 1}}', f"{INDEX} is corrupt: it has no weight_map from tensors to files"),
        ('{"weight_map": {"a": "b", "a": "c"}}', f"{INDEX} is corrupt: it has the key 'a' twice"),
    ],
)
def test_a_corrupt_index(sharded, import_refused, content, words):
    (sharded / INDEX).write_text(content)
    import_refused(sharded, words)


def split_header(file):
    """Return the parsed header of a safetensors file and the bytes after it."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_with_header(file, text, values, length=None):
    raw = text.encode()
    file.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + values)


def in_header(change):
    """Return an edit that applies `change` to the header entries of a file."""

    def edit(file):
        header, values = split_header(file)
        change(header)
        write_with_header(file, json.dumps(header), values)

    return edit


def repeat_header_key(file):
    header, values = split_header(file)
    entry = f'"lm_head.weight": {json.dumps(header["lm_head.weight"])}'
    write_with_header(file, "{" + entry + ", " + json.dumps(header)[1:], values)


def flip_in_header(file):
    raw = bytearray(file.read_bytes())
    raw[8 + raw[8:].index(b"lm_head")] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-10]), f"{SINGLE} is corrupt"),
        (lambda file: file.write_bytes(file.read_bytes()[:100]), f"{SINGLE} is corrupt"),
        (lambda file: file.write_bytes(b""), f"{SINGLE} is corrupt"),
        (lambda file: file.write_bytes(file.read_bytes() + b"more"), f"{SINGLE} is corrupt"),
        (lambda file: file.write_bytes((2**60).to_bytes(8, "little") + file.read_bytes()[8:]), f"{SINGLE} is corrupt"),
        (lambda file: file.write_bytes((2**63).to_bytes(8, "little") + file.read_bytes()[8:]), f"{SINGLE} is corrupt"),
        (lambda file: write_with_header(file, "[" * 9000, b""), f"{SINGLE} is corrupt"),
        (lambda file: write_with_header(file, "[]", b""), f"{SINGLE} is corrupt"),
        (lambda file: write_with_header(file, "{}", b""), "has 0 tensors in total"),
        (flip_in_header, "lacks the tensor lm_head.weight, which"),
        (repeat_header_key, f"{SINGLE} is corrupt: its header has the key 'lm_head.weight' twice"),
        (in_header(lambda t: t["lm_head.weight"].update(data_offsets=[0, 2**60])), f"{SINGLE} is corrupt"),
        (in_header(lambda t: t["lm_head.weight"].update(data_offsets=[5, 1])), f"{SINGLE} is corrupt"),
        (in_header(lambda t: t["lm_head.weight"].update(shape=[2**40, 2**40])), f"{SINGLE} is corrupt"),
        (in_header(lambda t: t["lm_head.weight"].update(shape=[-96, -32])), f"{SINGLE} is corrupt"),
        (in_header(lambda t: t["lm_head.weight"].update(shape="96x32")), f"{SINGLE} is corrupt"),
        (in_header(lambda t: t["lm_head.weight"].update(dtype="F31")), f"{SINGLE} is corrupt"),
        (in_header(lambda t: t["lm_head.weight"].pop("dtype")), f"{SINGLE} is corrupt"),
        (
            in_header(
                lambda t: t["lm_head.weight"].update(data_offsets=t["model.embed_tokens.weight"]["data_offsets"])
            ),
            f"{SINGLE} is corrupt",
        ),
        (in_header(lambda t: t["lm_head.weight"].update(shape=[32, 96])), "lm_head.weight has shape (32, 96)"),
    ],
)
def test_corrupt_safetensors(single_file, import_refused, edit, words):
    edit(single_file / SINGLE)
    import_refused(single_file, str(single_file), words)


def test_a_flipped_bit_under_checksums(single_file, import_refused):
    write_sums(single_file)
    raw = bytearray((single_file / SINGLE).read_bytes())
    raw[-5] ^= 1
    (single_file / SINGLE).write_bytes(raw)
    import_refused(
        single_file, f"{single_file / SINGLE} does not match its checksum in SHA256SUMS: it is corrupt or was changed"
    )


def test_corrupt_checksums(single_file, import_refused):
    (single_file / "SHA256SUMS").write_text("no sums\n")
    import_refused(single_file, "SHA256SUMS, line 1 is 'no sums': it must be 64 hexadecimal digits")


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda t: t.update({"model.layers.1.extra.weight": torch.zeros(3)}),
            "extra.weight is not a tensor of the model",
        ),
        (lambda t: t.update({"\x1b[2J\nevil\0": torch.zeros(3)}), r"\x1b[2J evil\x00 is not a tensor of the model in"),
        (lambda t: t.pop("model.layers.1.mlp.gate.weight"), "lacks the tensor model.layers.1.mlp.gate.weight, which "),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(31)}),
            "model.norm.weight has shape (31,), {config} requires (32,)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(32).to(torch.float8_e4m3fn)}),
            "model.norm.weight is F8_E4M3; accepted are F32, BF16, F16",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int64)}),
            "model.norm.weight is I64; accepted are F32, BF16, F16",
        ),
        (
            lambda t: t.update({"model.layers.2.eh_proj.weight": torch.zeros(32, 64)}),
            "model.layers.2.eh_proj.weight is in a layer beyond num_hidden_layers 2 of {config}: multi-token "
            "prediction layers (num_nextn_predict_layers) are not supported",
        ),
    ],
)
def test_tensors_that_do_not_match_the_config(single_file, import_refused, change, words):
    change_tensors(single_file, change)
    import_refused(single_file, str(single_file), words.format(config=single_file / "config.json"))


# The folder


def test_no_folder(single_file, import_refused, tmp_path):
    words = "is not a Hugging Face folder: give one with config.json and safetensors files"
    import_refused(tmp_path / "nowhere", f"{tmp_path / 'nowhere'} {words}")
    import_refused(single_file / "config.json", f"{single_file / 'config.json'} {words}")
    (single_file / SINGLE).unlink()
    import_refused(
        single_file, f"{single_file} has neither {INDEX} nor {SINGLE}: only safetensors folders are accepted"
    )


def test_a_pickle_is_not_opened(single_file, import_refused, tmp_path):
    (single_file / SINGLE).unlink()
    mark = tmp_path / "mark"
    (single_file / "pytorch_model.bin").write_bytes(b"cposix\nmkdir\n(V" + str(mark).encode() + b"\ntR.")
    import_refused(
        single_file, "pytorch_model.bin is a pickle, which can run code: only safetensors files are accepted"
    )
    assert not mark.exists()


@pytest.mark.parametrize(
    "name, words",
    [
        ("", "' is not readable; see moonlight import --help"),
        (SINGLE, ": Permission denied; this user may not read or write it"),
    ],
)
def test_without_permission(single_file, tmp_path, name, words):
    (single_file / name).chmod(0)
    code, _, err = run_command("import", single_file, "--out", tmp_path / "checkpoint")
    (single_file / name).chmod(0o700)
    check_line(code, err, (f"{single_file / name}{words}",))
    assert not (tmp_path / "checkpoint").exists()


def test_code_of_the_folder_is_not_run(single_file, tmp_path):
    mark = tmp_path / "mark"
    (single_file / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    change_config(single_file, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    assert import_folder(single_file, tmp_path / "checkpoint")
    assert not mark.exists()


def test_links_into_a_cache_work(sharded, tmp_path):
    """A snapshot folder whose files link to blobs, as in the Hugging Face cache, imports and exports unchanged."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for index, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / f"{index:064x}")
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / f"{index:064x}")
    assert import_folder(snapshot, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "back")
    assert raw_tensors(tmp_path / "back") == raw_tensors(snapshot)


# The tokenizer


@pytest.fixture
def with_tokenizer(single_file, tokenizer_folder):
    """The model of 96 embedding rows with a tokenizer of 1024 ids."""
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, single_file)
    return single_file


def test_a_tokenizer_larger_than_the_embedding(with_tokenizer, import_refused):
    words = "has 1024 ids for text, vocab_size of its config.json is 96: the embedding needs a row for each id"
    import_refused(with_tokenizer, f"tokenizer {with_tokenizer} {words}")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("tokenizer.model", b"", "tokenizer.model is not a SentencePiece model"),
        ("tokenizer.model", b"\xff" * 99, "tokenizer.model is not a SentencePiece model"),
        ("tokenizer.json", b"{", "tokenizer.json is corrupt: a JSON object is expected"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', "tokenizer.json is not a Hugging Face fast tokenizer"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json is corrupt: a JSON object is expected"),
        ("generation_config.json", b"\xff", "generation_config.json is corrupt: it is not a JSON object"),
    ],
)
def test_a_corrupt_tokenizer(with_tokenizer, import_refused, name, content, words):
    change_config(with_tokenizer, vocab_size=1024)
    change_tensors(
        with_tokenizer,
        lambda t: t.update({name: torch.zeros(1024, 32) for name in ("model.embed_tokens.weight", "lm_head.weight")}),
    )
    if name == "tokenizer.json":
        (with_tokenizer / "tokenizer.model").unlink()
    (with_tokenizer / name).write_bytes(content)
    import_refused(with_tokenizer, str(with_tokenizer / name), words)
