"""Examples: data in every format, models, and sweeps that finish, resume and report correct results."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from examples import classifier, gpt
from examples.images import RECORD_BYTES, load_images, read_parquet
from examples.sweep import Outcome, Task, point_key, positive_rates, sweep
from examples.text import MAGIC, VERSION, draw, in_order, load_text, read_shard
from moonlight.errors import UserError
from tests.support.bad_input import check_line

DIGITS = replace(classifier.PRESETS["digits"], most_steps=12, test_every=4)
SMALL = replace(
    gpt.PRESETS["small"], layers=2, width=32, heads=2, length=32, batch=4, at_once=4, most_steps=6, test_every=3
)


def write_shard(path, tokens, count=None, magic=MAGIC):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, VERSION, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def test_digits_are_split_and_scaled():
    images = load_images("digits")
    assert images.train.shape == (1437, 1, 8, 8) and images.test.shape == (360, 1, 8, 8)
    assert abs(images.train.mean()) < 1e-5 and abs(images.train.std() - 1) < 1e-3
    assert images.test_labels.bincount().min() > 20
    assert images.train_labels.bincount().tolist() != [0] * 10


def test_cifar_files_are_read(tmp_path):
    """Five training files and one test file in CIFAR-10's format are read and trained on."""
    digits = load_images("digits")
    for index, name in enumerate([*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]):
        records = np.zeros((20, RECORD_BYTES), dtype=np.uint8)
        records[:, 0] = digits.train_labels[20 * index : 20 * index + 20]
        records[:, 1:] = np.random.default_rng(index).integers(0, 256, (20, 3072))
        records[:, 1025] = np.arange(20)  # first green pixel
        (tmp_path / name).write_bytes(records.tobytes())
    images = load_images(str(tmp_path))
    assert images.train.shape == (100, 3, 32, 32) and images.test.shape == (20, 3, 32, 32)
    assert images.train_labels.tolist() == digits.train_labels[:100].tolist()
    green = images.train[:20, 1, 0, 0]
    assert torch.allclose(green.diff(), green.diff()[0].expand(19), atol=1e-4) and green.diff()[0] > 0
    preset = replace(classifier.PRESETS["cifar10"], widths=(8, 8), batch=20, most_steps=2, test_every=1)
    outcome = classifier.train(str(tmp_path), preset, 0.0, "cpu", "muon", 0.01, 1)
    assert outcome.steps is None and [step for step, _ in outcome.curve] == [1, 2]
    (tmp_path / "test_batch.bin").write_bytes(b"x" * 5000)
    load_images.cache_clear()
    with pytest.raises(UserError, match="multiple of 3073"):
        load_images(str(tmp_path))


def test_parquet_files_of_the_hub_are_read(tmp_path):
    import io

    import pyarrow as pa
    import pyarrow.parquet
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    cells = []
    for image in pixels:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        cells.append({"bytes": stream.getvalue(), "path": None})
    pyarrow.parquet.write_table(pa.table({"img": cells, "label": [3, 1, 9]}), tmp_path / "train.parquet")
    images, labels = read_parquet(tmp_path / "train.parquet")
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels)
    assert labels.tolist() == [3, 1, 9]


def test_library_text_is_the_bytes_of_python_files():
    text = load_text("python")
    assert text.vocabulary == 256 and len(text.train[0]) > 15 * len(text.held_out) > 10**6
    assert b"import " in text.held_out[:20000].tobytes()


def test_shards_are_read_and_drawn_from(tmp_path):
    write_shard(tmp_path / "fineweb_train_000001.bin", np.arange(500))
    write_shard(tmp_path / "fineweb_train_000002.bin", np.arange(1000, 1100))
    write_shard(tmp_path / "fineweb_val_000000.bin", np.arange(50000, 50257))
    text = load_text(str(tmp_path))
    assert text.vocabulary == 50304 and [len(part) for part in text.train] == [500, 100]
    windows = draw(text.train, 200, 16, torch.Generator().manual_seed(0))
    assert windows.shape == (200, 17) and bool((windows.diff() == 1).all())
    starts = windows[:, 0]
    assert 0 < int((starts >= 1000).sum()) < 60 and int(starts[starts < 1000].max()) <= 483
    held_out = in_order(text.held_out, 100, 16)
    assert held_out.shape == (16, 17) and held_out[1, 0] == 50016


@pytest.mark.parametrize("fault", ["magic", "cut", "empty"])
def test_corrupt_shards_are_refused(tmp_path, fault):
    path = tmp_path / "shard.bin"
    write_shard(path, np.arange(100), magic=7 if fault == "magic" else MAGIC, count=101 if fault == "cut" else None)
    if fault == "empty":
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"shard\.bin"):
        read_shard(path)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_models_learn_and_runs_repeat(name, one_thread):
    first = classifier.train("digits", DIGITS, 0.0, "cpu", name, 0.01, 1)
    assert [step for step, _ in first.curve] == [4, 8, 12] and first.steps is None
    assert first.curve[-1][1] < 0.7  # guessing has an error of 0.9
    assert classifier.train("digits", DIGITS, 0.0, "cpu", name, 0.01, 1).curve == first.curve
    assert classifier.train("digits", DIGITS, 0.0, "cpu", name, 0.01, 2).curve != first.curve
    text = gpt.train("python", SMALL, "cpu", name, 0.01, 1)
    assert [step for step, _ in text.curve] == [3, 6]
    assert text.curve[1][1] < text.curve[0][1] < math.log(256)
    easy = replace(SMALL, target=text.curve[0][1])
    assert gpt.train("python", easy, "cpu", name, 0.01, 1).steps == 3


def test_muon_has_the_matrices_and_adamw_the_rest():
    model = gpt.GPT(256, SMALL)
    optimizer = gpt.make_optimizer(model, "muon", 0.01)
    shapes = [[tuple(param.shape) for param in group["params"]] for group in optimizer.param_groups]
    assert shapes[0] == [(3, 32, 32), (32, 32), (128, 32), (32, 128)] * 2
    assert shapes[1] == [(256, 32), (256, 32)]
    convolutional = classifier.Classifier(1, DIGITS)
    optimizer = classifier.make_optimizer(convolutional, "muon", 0.01)
    assert [param.dim() for param in optimizer.param_groups[0]["params"]] == [4] * 4
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(convolutional.parameters()))


def fake_train(folder: Path, best: dict[str, float], name: str, rate: float, seed: int) -> Outcome:
    """Return an outcome whose steps grow with the distance from the best rate. Create one file per call."""
    (folder / f"{name}-{rate:g}-{seed}").open("x").close()
    steps = round(100 * (1 + math.log2(rate / best[name]) ** 2)) + seed
    return Outcome(steps if steps < 500 else None, [(1, 2.0), (steps, 1.0)], 0.1)


@pytest.fixture
def task(tmp_path):
    (tmp_path / "calls").mkdir()
    train = partial(fake_train, tmp_path / "calls", {"muon": 0.04, "adamw": 0.01})
    return Task("test", "loss", 1.0, {"target": 1.0}, train)


def test_a_sweep_widens_its_grid_and_resumes_without_repeats(task, tmp_path, capsys):
    out = tmp_path / "out"
    assert not sweep(task, out, [0.005, 0.01, 0.02], [1], jobs=2)  # both need equally many steps
    table = (out / "results.md").read_text()
    assert "Muon needs 1.00 of tuned AdamW's steps (101.0 at 0.04, 101.0 at 0.01)" in table and "NOT met" in table
    assert "not yet" not in table and "| 0.08 |" in table and "| 0.16 |" not in table
    calls = len(list((tmp_path / "calls").iterdir()))
    assert calls == 2 * 5
    # With one result deleted and a second seed, only the missing runs are made: `fake_train` fails on repeats.
    content = json.loads((out / "results.json").read_text())
    del content["points"][point_key(("muon", 0.08, 1))]
    (out / "results.json").write_text(json.dumps(content))
    (tmp_path / "calls" / "muon-0.08-1").unlink()
    sweep(task, out, [0.005, 0.01, 0.02], [1, 2], jobs=1)
    assert len(list((tmp_path / "calls").iterdir())) == 2 * 5 * 2
    assert (out / "results.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="give another --out"):
        sweep(replace(task, settings={"target": 2.0}), out, [0.005], [1], jobs=1)


def test_a_target_that_is_not_reached_gives_no_ratio(tmp_path):
    train = partial(fake_failure, 0)
    assert not sweep(Task("test", "loss", 1.0, {}, train), tmp_path / "out", [0.01, 0.02], [1], jobs=1)
    text = (tmp_path / "out" / "results.md").read_text()
    assert "did not reach the target" in text and "not reached" in text


def fake_failure(_: int, name: str, rate: float, seed: int) -> Outcome:
    return Outcome(None, [(1, 2.0 + abs(math.log(rate / 0.014)))], 0.1)


@pytest.mark.parametrize("text", ["", "0.1,x", "0.1,-1", "0", "inf"])
def test_bad_rates_are_refused(text):
    with pytest.raises(UserError, match="--rates"):
        positive_rates(text)


@pytest.mark.parametrize("module", [gpt, classifier])
def test_a_missing_folder_gives_one_line(module, monkeypatch, capfd):
    monkeypatch.setattr("sys.argv", ["example", "--data", "nowhere"])
    with pytest.raises(SystemExit) as exit_info:
        module.main()
    check_line(exit_info.value.code, capfd.readouterr().err, ["nowhere"])


@pytest.mark.parametrize(
    "option, words",
    [("--seeds=0", "--seeds is 0"), ("--jobs=-1", "--jobs is -1"), ("--rates=x", "--rates"), ("--seeds=x", "--help")],
)
def test_bad_options_give_one_line(option, words, monkeypatch, capfd):
    monkeypatch.setattr("sys.argv", ["example", option])
    with pytest.raises(SystemExit) as exit_info:
        classifier.main()
    check_line(exit_info.value.code, capfd.readouterr().err, [words])
