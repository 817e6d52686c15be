"""The harness on our exports and on other architectures: likelihoods, the offline suite, answers, stored results."""

import dataclasses
import json
import shutil

import pytest
import torch

from checkpoints.export import export
from checkpoints.reader import open_checkpoint
from checkpoints.verify import run_megatron
from eval.evaluate import EvalOptions, evaluate
from eval.harness import load_harness_model
from moonlight.errors import UserError
from tests.support.evaluations import GSM8K, items, write_dense, write_gsm8k

OFFLINE = EvalOptions(suite="offline", allow_code=True)


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    """The tiny run's two checkpoints, exported."""
    folder = tmp_path_factory.mktemp("exported")
    export(tiny_run.folder, folder / "tiny" / "hf")
    export(tiny_run.folder, folder / "step-2", revision_step=2)
    return folder


@pytest.fixture(scope="module")
def offline(exported):
    """The offline suite, evaluated on both exports."""
    return evaluate([exported / "step-2", exported / "tiny" / "hf"], OFFLINE, exported / "out")


def requests(*pairs):
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


PAIRS = [
    ("import os\nimport", " sys"),
    ("class Stack:\n    def __init__(self):", "\n        self.items = []"),
    ("The opposite of left is", " right"),
    ("月光照在", "河面上"),
    ("", "def main():\n    return 0"),
    ("x " * 40 + "x", " y z"),
]
"""(context, continuation); the last context is longer than the model's maximum."""


def test_loglikelihoods_equal_our_own_forward_pass(exported, tiny_run):
    """Log-likelihoods of the export equal float64 sums over Megatron's logits of the checkpoint."""
    model = load_harness_model(exported / "tiny" / "hf", "transformers", "float32", batch_size=4)
    scores = model.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    checkpoint = open_checkpoint(tiny_run.folder)
    eos_id = model.tokenizer.eos_token_id
    for (context, continuation), (loglikelihood, is_greedy) in zip(PAIRS, scores, strict=True):
        before = model.tokenizer(context)["input_ids"]
        # The harness encodes the context alone, even if the next characters would merge with its last token.
        new = model.tokenizer(context + continuation)["input_ids"][len(before) :]
        count = len(new)
        sequence = [*(before or [eos_id]), *new]
        sequence = sequence[-(checkpoint.model_config.max_position_embeddings + 1) :]
        logits, _ = run_megatron(checkpoint, torch.tensor([sequence[:-1]]), torch.float32)
        logprobs = logits[0, -count:].double().log_softmax(-1)
        labels = torch.tensor(sequence[-count:])
        assert loglikelihood == pytest.approx(logprobs.gather(1, labels[:, None]).sum().item(), abs=1e-4)
        assert is_greedy == (logprobs.argmax(-1) == labels).all().item()


def test_a_long_text_is_scored_in_windows(exported, tiny_run):
    """The log-likelihood of a text longer than the context is the sum over all its tokens, each predicted once."""
    from lm_eval.api.instance import Instance

    text = "def area(width, height):\n    return width * height\n\n" * 12
    model = load_harness_model(exported / "tiny" / "hf", "transformers", "float32", batch_size=4)
    (score,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    checkpoint = open_checkpoint(tiny_run.folder)
    length = checkpoint.model_config.max_position_embeddings
    ids = [model.tokenizer.eos_token_id, *model.tokenizer(text)["input_ids"]]
    assert len(ids) > 2 * length
    total, done = 0.0, 0
    while done < len(ids) - 1:
        # The harness extends the last window backwards to full length.
        new = min(length, len(ids) - 1 - done)
        window = ids[max(0, done + new - length) : done + new + 1]
        logits, _ = run_megatron(checkpoint, torch.tensor([window[:-1]]), torch.float32)
        logprobs = logits[0, -new:].double().log_softmax(-1)
        total += logprobs.gather(1, torch.tensor(window[-new:])[:, None]).sum().item()
        done += new
    assert score == pytest.approx(total, abs=1e-3)


def test_the_offline_suite_end_to_end(offline, exported):
    record = json.loads((offline.out / "results.json").read_text())
    assert [model["label"] for model in record["models"]] == ["step-2", "tiny"]
    assert [model["tokens"] for model in record["models"]] == [512, 1024]
    for model in record["models"]:
        results = model["results"]
        assert {name: entry["items"] for name, entry in results.items()} == {
            "choice": 24,
            "recall": 25,
            "code": 10,
            "text": 8,
        }
        answers = {name: items(offline.out / model["label"], name) for name in results}
        for name in ("choice", "recall", "code"):
            scores = [item["score"] for item in answers[name]]
            assert results[name]["score"] == pytest.approx(sum(scores) / len(scores))
        for item in answers["choice"]:
            best = item["loglikelihoods"].index(max(item["loglikelihoods"]))
            assert item["answer"] == best and item["score"] == (best == item["target"])
        for item in answers["recall"]:
            assert item["score"] == (item["answer"].lower() == item["target"].lower())
        assert results["recall"]["truncated"] > 0, "three examples and a question are longer than 64 tokens"
        assert 3 < results["text"]["score"] < 11, "bits per byte of an almost untrained model"
    assert "± " in offline.table and "lm-evaluation-harness 0.4.13 with transformers in float32" in offline.table
    assert (offline.out / "table.md").read_text() == offline.table
    assert "Prompts longer than the context" in offline.table


def test_several_checkpoints_give_a_curve(offline):
    from PIL import Image

    assert offline.curve == offline.out / "curve.png"
    with Image.open(offline.curve) as plot:
        assert plot.size[0] > 1000 and len(set(plot.convert("RGB").resize((90, 30)).getdata())) > 8


def test_finished_evaluations_are_skipped(offline, exported, capsys):
    folder = offline.out / "tiny"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    evaluate([exported / "step-2", exported / "tiny" / "hf"], OFFLINE, offline.out)
    assert "tiny: already evaluated" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_an_interrupted_evaluation_resumes(offline, exported, tmp_path):
    shutil.copytree(offline.out, tmp_path / "out")
    deleted = tmp_path / "out" / "tiny" / "choice.json"
    expected = json.loads(deleted.read_text())
    deleted.unlink()
    other = tmp_path / "out" / "tiny" / "text.json"
    before = other.stat().st_mtime_ns
    evaluate([exported / "step-2", exported / "tiny" / "hf"], OFFLINE, tmp_path / "out")
    rerun = json.loads(deleted.read_text())
    assert other.stat().st_mtime_ns == before
    assert rerun | {"seconds": 0} == expected | {"seconds": 0}
    assert items(tmp_path / "out" / "tiny", "choice") == items(offline.out / "tiny", "choice")


def test_benchmarks_run_one_by_one_share_a_table(offline, exported, tmp_path):
    folder = exported / "tiny" / "hf"
    evaluate([folder], EvalOptions(suite="offline", tasks=("text",)), tmp_path / "out")
    output = evaluate([folder], EvalOptions(suite="offline", tasks=("choice",)), tmp_path / "out")
    rows = [line.split(" | ")[0] for line in output.table.splitlines() if line.startswith("| ")]
    assert rows == ["| benchmark", "| multiple choice", "| text, bits per byte"]
    expected = json.loads((offline.out / "results.json").read_text())["models"][1]["results"]
    (model,) = json.loads((output.out / "results.json").read_text())["models"]
    for name in ("choice", "text"):
        assert model["results"][name]["score"] == expected[name]["score"]


def test_results_of_another_evaluation_are_not_mixed_in(offline, exported):
    with pytest.raises(UserError, match="has a different limit: choose another --out"):
        evaluate([exported / "tiny" / "hf"], EvalOptions(suite="offline", limit=2), offline.out)


def test_a_limited_evaluation_has_its_own_folder(tmp_path, tokenizer_folder):
    """The default folder of a limited evaluation differs from that of the full suite."""
    folder = write_dense(tmp_path / "llama", "llama", tokenizer_folder)
    output = evaluate([folder], EvalOptions(suite="offline", tasks=("choice",), limit=2))
    assert output.out == tmp_path / "evaluation" / "offline-first-2"
    first, second = items(output.out / "llama", "choice")
    assert first["question"] == "def area(width, height):\n    return width *"
    assert second["question"] == "for index, item in"


def test_code_does_not_run_without_permission(exported, tmp_path, capsys):
    output = evaluate([exported / "tiny" / "hf"], EvalOptions(suite="offline", limit=2), tmp_path / "out")
    assert "code: skipped" in capsys.readouterr().out
    assert "| code | 0 | not run |" in output.table and "do not compare these scores" in output.table
    assert not (tmp_path / "out" / "tiny" / "code.json").exists()
    assert output.curve is None


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_other_architectures_use_the_same_code(family, tmp_path, tokenizer_folder, capsys):
    folder = write_dense(tmp_path / family, family, tokenizer_folder)
    output = evaluate([folder], OFFLINE)
    assert "Executing answers: 100%" in capsys.readouterr().err
    assert output.out == tmp_path / "evaluation" / "offline"
    for name, count in (("choice", 24), ("recall", 25), ("code", 10), ("text", 8)):
        assert len(items(output.out / family, name)) == count


@pytest.mark.parametrize("family", ["llama", "unheard_of"])
def test_code_of_a_folder_is_never_run(family, tmp_path, tokenizer_folder):
    """A known architecture uses transformers' own code, whatever code the folder has. An unknown one is refused."""
    folder, ran = write_dense(tmp_path / "llama", "llama", tokenizer_folder), tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    classes = {name: f"code.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}
    for file, auto_map in (("config.json", classes), ("tokenizer_config.json", {"AutoTokenizer": ["code.T", None]})):
        content = json.loads((folder / file).read_text()) | {"auto_map": auto_map}
        if "model_type" in content:
            content["model_type"] = family
        (folder / file).write_text(json.dumps(content))
    options = EvalOptions(suite="offline", tasks=("choice",), limit=2)
    if family == "llama":
        assert evaluate([folder], options, tmp_path / "out").table
    else:
        with pytest.raises(UserError, match="llama cannot be loaded with transformers: "):
            evaluate([folder], options, tmp_path / "out")
    assert not ran.exists()


def test_a_benchmark_of_the_paper_from_a_local_folder(tmp_path, tokenizer_folder):
    """The harness's task with four examples runs on a local data set; the table has the published scores."""
    folder = write_dense(tmp_path / "llama", "llama", tokenizer_folder, max_position_embeddings=1024)
    data = write_gsm8k(tmp_path / "data")
    options = EvalOptions(suite="paper", tasks=("gsm8k",), data_dir=data, limit=3)
    output = evaluate([folder], options, tmp_path / "out")
    answers = items(tmp_path / "out" / "llama", "gsm8k")
    assert [item["target"] for item in answers] == [row["answer"] for row in GSM8K[:3]]
    with pytest.raises(UserError, match=r"gsm8k\.json has a different data_dir"):
        evaluate([folder], dataclasses.replace(options, data_dir=write_gsm8k(tmp_path / "other")), tmp_path / "out")
    row = next(line for line in output.table.splitlines() if line.startswith("| GSM8K"))
    assert row == "| GSM8K | 4 | 0.0 ± 0.0 | 34.0 | 79.1 | 41.1 | 77.4 |"
