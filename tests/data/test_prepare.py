"""Data preparation: the output holds the documents' ids, for any input format and number of workers."""

import gzip
import json
import lzma
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moonlight.data.documents import fingerprint, iter_files, read_records
from moonlight.data.manifest import check_tokenizer, load_manifest
from moonlight.data.prepare import prepare
from moonlight.data.tokenizer import Tokenizer
from moonlight.data.tokenizer_train import train_tokenizer
from moonlight.errors import UserError

DOCUMENTS = [f"# file {i}\n" + "def f(x):\n    return x + 1\n" * (i % 5) + "漢字 😀\r\n\t" * (i % 3) for i in range(40)]
DATA_FILES = ("train.bin", "train.idx", "validation.bin", "validation.idx")
SHARE = 0.25


def write_jsonl(path, documents, key="text"):
    path.write_text("".join(json.dumps({key: text, "id": i}) + "\n" for i, text in enumerate(documents)))
    return path


def read_back(folder, split):
    """Return the documents of one split as lists of ids."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(folder / split))
    assert len(dataset.document_indices) == len(dataset) + 1, "one sequence a document"
    return [dataset[i].tolist() for i in range(len(dataset))]


def contents(folder, names=DATA_FILES):
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("jsonl") / "all.jsonl", DOCUMENTS)


@pytest.fixture(scope="module")
def prepared(jsonl, tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare([jsonl], tokenizer_folder, folder, validation_share=SHARE, license="CC0-1.0")
    return folder


def test_reads_back_as_encoded_documents(prepared, tokenizer_folder):
    tokenizer = Tokenizer.load(tokenizer_folder)
    train, validation = read_back(prepared, "train"), read_back(prepared, "validation")
    expected = [[*tokenizer.encode(text), tokenizer.eos_id] for text in DOCUMENTS]
    assert sorted(train + validation) == sorted(expected)
    assert train == [ids for ids in expected if ids in train], "documents keep their order"
    assert 3 <= len(validation) <= 20


def test_manifest_counts(prepared, jsonl, tokenizer_folder):
    tokenizer = Tokenizer.load(tokenizer_folder)
    manifest = load_manifest(prepared)
    ids = [document for split in ("train", "validation") for document in read_back(prepared, split)]
    assert manifest["sources"] == [
        {
            "path": str(jsonl),
            "license": "CC0-1.0",
            "documents": len(DOCUMENTS),
            "bytes": sum(len(text.encode()) for text in DOCUMENTS),
            "tokens": sum(map(len, ids)),
        }
    ]
    held_out = "".join(
        text for text in DOCUMENTS if [*tokenizer.encode(text), tokenizer.eos_id] in read_back(prepared, "validation")
    ).encode()
    validation = manifest["splits"]["validation"]
    assert validation["bytes"] == validation["compressed_text_bytes"] == len(held_out)
    assert validation["gzip_bytes"] == len(gzip.compress(held_out, 9))
    assert validation["xz_bytes"] == len(lzma.compress(held_out, preset=9))
    assert validation["dtype"] == "uint16"
    check_tokenizer(prepared, manifest, tokenizer)
    assert not (prepared / "quarantine.jsonl").exists()


def test_every_format_gives_the_same_ids(prepared, tokenizer_folder, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i, text in enumerate(DOCUMENTS):
        (texts / f"{i:03}.md").write_bytes(text.encode())
    zipped = tmp_path / "all.jsonl.gz"
    with gzip.open(zipped, "wt") as file:
        file.writelines(json.dumps({"body": text}) + "\n" for text in DOCUMENTS)
    parquet = tmp_path / "all.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": range(40), "body": DOCUMENTS}), parquet, row_group_size=7)
    for path in (texts, zipped, parquet):
        out = tmp_path / f"from-{path.name}"
        prepare([path], tokenizer_folder, out, validation_share=SHARE, text_field="body")
        assert contents(out) == contents(prepared)


def test_any_number_of_workers_writes_the_same_bytes(tokenizer_folder, tmp_path):
    inputs = write_jsonl(tmp_path / "many.jsonl", [f"{i}\n{text * 40}" for i in range(60) for text in DOCUMENTS])
    for workers in (1, 2):
        prepare([inputs], tokenizer_folder, tmp_path / str(workers), workers=workers)
    names = (*DATA_FILES, "manifest.json")
    assert contents(tmp_path / "1", names) == contents(tmp_path / "2", names)


def test_added_files_keep_documents_in_their_split(prepared, jsonl, tokenizer_folder, tmp_path):
    more = write_jsonl(tmp_path / "more.jsonl", [f"new {text}" for text in DOCUMENTS])
    manifest = prepare([more, jsonl, more], tokenizer_folder, tmp_path / "data", validation_share=SHARE)
    assert [source["documents"] for source in manifest["sources"]] == [40, 40, 0]
    for split in ("train", "validation"):
        old, new = read_back(prepared, split), read_back(tmp_path / "data", split)
        assert [ids for ids in new if ids in old] == old


def test_bad_records_are_quarantined(tokenizer_folder, tmp_path):
    lines = [json.dumps({"text": text}).encode() for text in DOCUMENTS]
    lines[3:3] = [b"{not json", b'{"text": "\xff"}', b'{"other": 1}', b'{"text": 5}', b"[1]"]
    lines += [b"", b'{"text": ""}', rb'{"text": "\ud800"}', b"9" * 5000, b"[" * 100_000]
    path = tmp_path / "some.jsonl"
    path.write_bytes(b"\n".join(lines))
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\u00e9".encode("latin-1"))
    rows = pyarrow.table({"text": ["x", None, "", "y"]})
    pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 nothing")
    truncated = tmp_path / "cut.jsonl.gz"
    truncated.write_bytes(gzip.compress(b'{"text": "whole"}\n' * 9)[:-10])
    inputs = [path, latin, tmp_path / "rows.parquet", broken, truncated]
    manifest = prepare(inputs, tokenizer_folder, tmp_path / "data", validation_share=SHARE, max_bad_share=0.5)
    quarantine = [json.loads(line) for line in (tmp_path / "data" / "quarantine.jsonl").read_text().splitlines()]
    locations = [(Path(entry["file"]).name, entry["line"]) for entry in quarantine]
    assert locations[:8] == [("some.jsonl", line) for line in (4, 5, 6, 7, 8, 48, 49, 50)]
    assert [name for name, _ in locations[8:]] == ["latin.txt", "rows.parquet", "broken.parquet", "cut.jsonl.gz"]
    assert locations[9] == ("rows.parquet", 2)
    reasons = [entry["reason"] for entry in quarantine]
    expected = ["not JSON", "not UTF-8", "no field 'text'", "holds int", "not list", "surrogate", "int", "not JSON"]
    assert all(word in reason for word, reason in zip(expected, reasons, strict=False)), reasons
    assert manifest["bad_records"] == len(quarantine) == 12
    assert manifest["empty_documents"] == 3


def test_too_many_bad_records(tokenizer_folder, tmp_path):
    path = tmp_path / "some.jsonl"
    write_jsonl(path, DOCUMENTS)
    with path.open("a") as file:
        file.write("oops\n")
    with pytest.raises(UserError, match=r"1 of 41 records \(2\.44%\).*some\.jsonl, line 41: not JSON"):
        prepare([path], tokenizer_folder, tmp_path / "data", validation_share=SHARE)
    assert sorted(os.listdir(tmp_path)) == ["some.jsonl"]


def test_a_missing_parquet_column_counts_every_row(tokenizer_folder, tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": DOCUMENTS}), path)
    with pytest.raises(UserError, match=r"40 of 40 records .* no column 'text'"):
        prepare([path], tokenizer_folder, tmp_path / "data")


def test_preparing_twice(jsonl, tokenizer_folder, tmp_path, capsys):
    out = tmp_path / "data"
    first = prepare([jsonl], tokenizer_folder, out, validation_share=SHARE)
    before = (out / "train.bin").stat().st_mtime_ns
    assert prepare([jsonl], tokenizer_folder, out, validation_share=SHARE, workers=2) == first
    assert "already" in capsys.readouterr().out
    assert (out / "train.bin").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="different content"):
        prepare([jsonl], tokenizer_folder, out, validation_share=0.5)


def test_no_validation_split(jsonl, tokenizer_folder, tmp_path):
    manifest = prepare([jsonl], tokenizer_folder, tmp_path / "data", validation_share=0)
    assert set(manifest["splits"]) == {"train"}
    assert len(read_back(tmp_path / "data", "train")) == len(DOCUMENTS)
    assert load_manifest(tmp_path / "data") == manifest


def test_errors_name_the_bad_input(jsonl, tokenizer_folder, tmp_path):
    out = tmp_path / "data"
    empty = tmp_path / "empty"
    empty.mkdir()
    one = tmp_path / "one.txt"
    one.write_text("one document")
    for inputs, options, message in (
        ([tmp_path / "nowhere"], {}, "nowhere does not exist"),
        ([empty], {}, "has no files of text"),
        ([], {}, "no documents"),
        ([one], {"validation_share": 1e-9}, r"validation_share is 1e-09: no document of .* falls into validation"),
        ([one], {"validation_share": 1 - 1e-9}, "falls into train"),
        ([jsonl], {"validation_share": 1.0}, r"validation_share is 1\.0"),
        ([jsonl], {"max_bad_share": 2}, "max_bad_share is 2"),
        ([jsonl], {"workers": 0}, "workers is 0"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(inputs, tokenizer_folder, out, **options)
    with pytest.raises(UserError, match=r"no tokenizer\.model"):
        prepare([jsonl], empty, out)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_manifest_errors(prepared, jsonl, small_corpus, tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json: No such file"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="not a data manifest"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_bytes((prepared / "manifest.json").read_bytes())
    with pytest.raises(UserError, match=r"no train\.bin"):
        load_manifest(tmp_path)
    train_tokenizer([small_corpus], 600, tmp_path / "other")
    with pytest.raises(UserError, match="prepared with the tokenizer of checksum"):
        check_tokenizer(prepared, load_manifest(prepared), Tokenizer.load(tmp_path / "other"))


def test_iter_files_skips_hidden_and_binary_files(tmp_path, capsys):
    for name in ("b.py", "a/z.txt", "a/tests/t.py", "site-packages/s.py", ".hidden/h.py", "a/.h", "c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "loop").symlink_to(tmp_path)
    names = [str(path.relative_to(tmp_path)) for path in iter_files([tmp_path])]
    assert names == ["b.py", "c.jsonl", "a/z.txt"]
    assert "skipped 1 binary" in capsys.readouterr().err
    named_file = tmp_path / "a" / "tests" / "t.py"
    assert iter_files([named_file, named_file]) == [named_file]
    (record,) = read_records(tmp_path / "image.png")
    assert record.text is None and "NUL" in record.reason


def test_fingerprint_depends_on_names_and_content(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        for name in ("a.txt", "sub/b.txt"):
            (tmp_path / folder / name).write_text(name)
    one, two = (iter_files([tmp_path / folder]) for folder in ("one", "two"))
    assert fingerprint(one) == fingerprint(two)
    (tmp_path / "two" / "a.txt").write_text("A.txt")
    assert fingerprint(one) != fingerprint(two)


def run_prepare(*arguments, **options):
    prepare(*arguments, **options)


def test_a_killed_preparation_leaves_no_data_and_no_processes(tokenizer_folder, tmp_path):
    inputs = write_jsonl(tmp_path / "many.jsonl", [f"{i}\n{text * 40}" for i in range(100) for text in DOCUMENTS])
    context = multiprocessing.get_context("spawn")
    out = tmp_path / "data"
    process = context.Process(target=run_prepare, args=([inputs], tokenizer_folder, out), kwargs={"workers": 2})
    process.start()
    binary, deadline = tmp_path / ".data.part" / "train.bin", time.monotonic() + 40
    while not (binary.exists() and binary.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert binary.stat().st_size and len(children) >= 2 and not out.exists()
    while any(Path("/proc", child).exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [child for child in children if Path("/proc", child).exists()]
    prepare([inputs], tokenizer_folder, out)
    assert load_manifest(out)["sources"][0]["documents"] == 100 * len(DOCUMENTS)
    assert not binary.exists()
