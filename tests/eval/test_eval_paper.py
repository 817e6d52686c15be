"""Every benchmark of the paper, from a local data set to its score: prompts, filters, metrics.

A stub model gives the right answer, or the answer to another question: the score must be 1, or 0.
"""

import json
import re
import shutil
import subprocess

import datasets
import pytest
from lm_eval.api.model import LM

from eval.data_sets import leaves
from eval.harness import load_tasks, run_benchmark, task_manager
from eval.items import sample_items
from eval.suites import SUITES, select_benchmarks
from moonlight.errors import UserError
from tests.support.bad_input import ROOT
from tests.support.paper_sets import LETTERS, ROWS, write_set
from tests.support.suites import quick

ANSWERS = {
    "mmlu": lambda row: f" {LETTERS[row['answer']]}",
    "mmlu-pro": lambda row: f" It is said in the question. The answer is ({row['answer']}).",
    "bbh": lambda row: f"We look at it step by step. So the answer is {row['target']}.",
    "triviaqa": lambda row: f" {row['answer']['aliases'][1].upper()}\n\nQuestion: What else?",
    "humaneval": lambda row: row["canonical_solution"] + "\n\ndef another():\n    return nothing\n",
    "mbpp": lambda row: row["code"] + "\n[DONE]\nand more",
    "gsm8k": lambda row: f" {row['answer']}\n\nQuestion: What else?\n#### 7",
    "math": lambda row: (
        f" {row['solution']}\nFinal Answer: The final answer is {row['solution'].split()[-1]} I hope it is correct.\n\n"
        "Problem:\nHalve $14$.\n\nSolution: It is $\\boxed{7}$."
    ),
    "cmath": lambda row: f"我们来算，1+1=2。所以答案是{row['golden']}。\n\n问题：1+1=？答案：2",
    "ceval": lambda row: f" {row['answer']}",
    "cmmlu": lambda row: f" {row['Answer']}",
}
"""A base model's continuation after the few-shot examples: the answer, then another question."""

MARK = {
    "mmlu": "\nAnswer:",
    "mmlu-pro": "Question:\n",
    "bbh": "Q: ",
    "triviaqa": "Question: ",
    "humaneval": "def ",
    "mbpp": "[BEGIN]",
    "gsm8k": "Question: ",
    "math": "Problem:\n",
    "cmath": "问题：",
    "ceval": "\n答案：",
    "cmmlu": "\n答案：",
}
"""Text that a prompt has once for each example and once for the question."""


class StubModel(LM):
    """A stub model that answers `answer(row)`, cut at the task's stop strings, as backends do."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.prompts = answer, []

    def loglikelihood(self, requests):
        self.prompts += [request.args[0] for request in requests]
        return [(0.0 if request.args[1] == self.answer(request.doc) else -1.0, False) for request in requests]

    def generate_until(self, requests):
        self.prompts += [request.args[0] for request in requests]
        ends = [request.args[1]["until"] for request in requests]
        return [
            re.split("|".join(map(re.escape, end)), self.answer(request.doc))[0]
            for request, end in zip(requests, ends, strict=True)
        ]

    def loglikelihood_rolling(self, requests):
        raise AssertionError


@pytest.fixture(scope="module", autouse=True)
def separate_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """All eleven data sets."""
    index = task_manager(SUITES["paper"]).task_index
    folder = tmp_path_factory.mktemp("paper")
    for benchmark in SUITES["paper"]:
        write_set(folder, benchmark.name, list(leaves(index, benchmark.task)))
    return folder


@pytest.mark.parametrize("name", quick(ROWS, "mmlu", "cmmlu", "bbh", "gsm8k", "humaneval"))
def test_right_answers_score_1_and_wrong_answers_0(data_dir, name):
    (benchmark,) = select_benchmarks("paper", [name])
    tasks = load_tasks([benchmark], data_dir)[name]
    right = ANSWERS[name]
    indices = iter(range(10**6))

    def wrong(row):
        """Return the right answer to another row; for multiple choice, the next letter."""
        text = right(row)
        if name in ("mmlu", "ceval", "cmmlu", "mmlu-pro"):
            return re.sub(r"[A-J](?=\)?\.?$)", lambda match: "BCDAFGHIJE"["ABCDEFGHIJ".index(match[0])], text)
        if name == "bbh":
            return right({"target": "no such thing"})
        return right(ROWS[name](next(indices) + 5000, "x"))

    for answer, score in ((right, 1), (wrong, 0)):
        model = StubModel(answer)
        result = run_benchmark(model, benchmark, tasks, limit=2, backend="transformers", allow_code=True)
        assert result.score == score
        answers = sample_items(benchmark, result.samples)
        assert len(answers) == 2 * len(tasks["tasks"])
        assert {item["score"] for item in answers} == {score}
        for prompt in model.prompts:
            assert prompt.count(MARK[name]) == benchmark.shots + 1, prompt


def test_examples_are_answered_and_the_question_is_not(data_dir):
    """Prompts of our own tasks have answered examples and an open question."""
    (benchmark,) = select_benchmarks("paper", ["mbpp"])
    model = StubModel(ANSWERS["mbpp"])
    run_benchmark(
        model, benchmark, load_tasks([benchmark], data_dir)["mbpp"], limit=1, backend="transformers", allow_code=True
    )
    (prompt,) = model.prompts
    assert re.findall(r"to add (\d+)\.", prompt) == ["2", "3", "4", "11"]
    assert prompt.count("\n[DONE]\n\nYou are an expert") == 3 and prompt.endswith("assert add(2) == 13\n[BEGIN]\n")
    (benchmark,) = select_benchmarks("paper", ["cmath"])
    model = StubModel(ANSWERS["cmath"])
    run_benchmark(
        model, benchmark, load_tasks([benchmark], data_dir)["cmath"], limit=1, backend="transformers", allow_code=False
    )
    (prompt,) = model.prompts
    assert prompt.count("所以答案是") == 3 and prompt.endswith("加2等于多少？\n答案：")


def test_sampled_examples_are_deterministic(data_dir):
    (benchmark,) = select_benchmarks("paper", ["gsm8k"])
    prompts = []
    for _ in range(2):
        model = StubModel(ANSWERS["gsm8k"])
        run_benchmark(
            model,
            benchmark,
            load_tasks([benchmark], data_dir)["gsm8k"],
            limit=3,
            backend="transformers",
            allow_code=False,
        )
        prompts.append(model.prompts)
    assert prompts[0] == prompts[1]


def test_a_changed_data_folder_is_reread(tmp_path):
    """Rows come from the given folder. The cache of `datasets` alone returns those of an earlier folder of its name."""
    (benchmark,) = select_benchmarks("paper", ["cmath"])
    configs = list(leaves(task_manager([benchmark]).task_index, benchmark.task))
    for place in ("one", "other"):
        write_set(tmp_path / place, "cmath", configs)
        file = tmp_path / place / "weitianwen" / "cmath" / "default" / "test.jsonl"
        for word in ("梨", "苹果"):
            file.write_text(json.dumps({"question": f"{place}{word}", "golden": "3"}) + "\n")
            (task,) = load_tasks([benchmark], tmp_path / place)["cmath"]["tasks"].values()
            assert task.eval_docs[0]["question"] == f"{place}{word}"


def test_a_data_set_without_a_column_is_refused_before_the_model_loads(data_dir, tmp_path):
    (benchmark,) = select_benchmarks("paper", ["gsm8k"])
    folder = tmp_path / "openai" / "gsm8k" / "main"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        text = (data_dir / "openai" / "gsm8k" / "main" / f"{split}.jsonl").read_text()
        (folder / f"{split}.jsonl").write_text(text.replace('"question"', '"problem"'))
    (folder.parent / "README.md").write_text((data_dir / "openai" / "gsm8k" / "README.md").read_text())
    with pytest.raises(UserError, match=r"GSM8K: .*gsm8k is not the data set openai/gsm8k .*question"):
        load_tasks([benchmark], tmp_path)


def test_a_data_set_script_is_never_run(tmp_path):
    """A data set that is a script and an archive, as CMMLU on the Hub, is refused."""
    (benchmark,) = select_benchmarks("paper", ["cmmlu"])
    folder = tmp_path / "haonan-li" / "cmmlu"
    folder.mkdir(parents=True)
    ran = tmp_path / "ran"
    (folder / "cmmlu.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(UserError, match=r"CMMLU: the data set haonan-li/cmmlu is a script .*docs/evaluation\.md"):
        load_tasks([benchmark], tmp_path)
    assert not ran.exists()


def test_documented_commands_unpack_an_archive(tmp_path):
    """The commands in docs/evaluation.md convert CSV files like those in CMMLU's archive."""
    (benchmark,) = select_benchmarks("paper", ["cmmlu"])
    folder = tmp_path / "haonan-li" / "cmmlu"
    configs = list(leaves(task_manager([benchmark]).task_index, benchmark.task))
    for split in ("dev", "test"):
        (folder / split).mkdir(parents=True)
        for config in configs:
            rows = [ROWS["cmmlu"](index, config["dataset_name"]) for index in range(5)]
            lines = [",".join(["", *rows[0]])] + [",".join([str(n), *row.values()]) for n, row in enumerate(rows)]
            (folder / split / f"{config['dataset_name']}.csv").write_text("\n".join(lines) + "\n")
    text = (ROOT / "docs" / "evaluation.md").read_text()
    (script,) = re.findall(r"```\n(cd DIR/haonan-li/cmmlu\n.*?)```", text, re.DOTALL)
    archive = shutil.make_archive(str(tmp_path / "made"), "zip", folder)
    shutil.rmtree(folder)
    folder.mkdir()
    shutil.move(archive, folder / "cmmlu_v1_0_1.zip")
    (folder / "cmmlu.py").write_text("raise SystemExit\n")
    subprocess.run(["bash", "-e", "-c", script.replace("DIR/", f"{tmp_path}/")], check=True)
    model = StubModel(ANSWERS["cmmlu"])
    tasks = load_tasks([benchmark], tmp_path)["cmmlu"]
    assert run_benchmark(model, benchmark, tasks, limit=1, backend="transformers", allow_code=False).score == 1
