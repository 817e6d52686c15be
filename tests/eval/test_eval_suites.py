"""Suites: every benchmark is a task of the installed harness with the paper's shots; bad input gives one line."""

import pytest

from eval.data_sets import hub_names, leaves
from eval.harness import task_manager
from eval.suites import SUITES, select_benchmarks
from tests.support.bad_input import ROOT, check_line, run_command
from tests.support.evaluations import write_gsm8k
from tests.support.exports import make_ready

PUBLISHED = """
    | MMLU | 54.7 | 65.6 | 58.3 | 70.0 |
    | MMLU-pro | 25.0 | 34.6 | 25.5 | 42.4 |
    | BBH | 46.8 | 56.3 | 44.1 | 65.2 |
    | TriviaQA | 59.6 | 51.1 | 65.1 | 66.3 |
    | HumanEval | 28.0 | 42.1 | 29.9 | 48.1 |
    | MBPP | 48.7 | 57.1 | 43.2 | 63.8 |
    | GSM8K | 34.0 | 79.1 | 41.1 | 77.4 |
    | MATH | 8.5 | 42.6 | 17.1 | 45.3 |
    | CMath | – | 80.0 | 58.4 | 81.1 |
    | C-Eval | – | 75.0 | 60.3 | 77.2 |
    | CMMLU | – | 75.0 | 64.3 | 78.2 |
"""
"""Table 5 of the paper: Llama3.2-3B, Qwen2.5-3B, DeepSeek-V2-Lite, Moonlight."""

SHOTS = {"MMLU": 5, "MMLU-pro": 5, "BBH": 3, "TriviaQA": 5, "GSM8K": 4, "C-Eval": 5, "CMMLU": 5}
"""Few-shot counts that the paper states."""


@pytest.fixture(scope="module")
def manager():
    return task_manager([*SUITES["paper"], *SUITES["offline"]])


def test_scores_and_shots_equal_the_papers():
    rows = [
        [benchmark.title, *(f"{benchmark.published.get(name, 0):.1f}" for name in SUITES["paper"][0].published)]
        for benchmark in SUITES["paper"]
    ]
    expected = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PUBLISHED.strip().splitlines()]
    assert rows == [[cell.replace("–", "0.0") for cell in row] for row in expected]
    assert {benchmark.title: benchmark.shots for benchmark in SUITES["paper"] if benchmark.stated} == SHOTS


@pytest.mark.parametrize("benchmark", [*SUITES["paper"], *SUITES["offline"]], ids=lambda benchmark: benchmark.name)
def test_every_benchmark_is_a_task_of_the_harness(manager, benchmark):
    configs = list(leaves(manager.task_index, benchmark.task))
    assert configs
    assert len(hub_names(manager.task_index, benchmark.task)) == (0 if benchmark in SUITES["offline"] else 1)
    metric, _, name = benchmark.metric.partition(",")
    for config in configs:
        assert metric in [entry["metric"] for entry in config["metric_list"]]
        filters = [entry["name"] for entry in config.get("filter_list", [{"name": "none"}])]
        assert name in filters
        assert config.get("unsafe_code", False) is benchmark.runs_code
        # Few-shot examples must not come from the questions.
        if benchmark.shots:
            examples = config.get("fewshot_split") or config.get("training_split")
            assert examples != config.get("test_split") or "samples" in config.get("fewshot_config", {})
            assert examples or "samples" in config.get("fewshot_config", {})


def test_groups_have_all_their_tasks(manager):
    counts = {benchmark.name: len(list(leaves(manager.task_index, benchmark.task))) for benchmark in SUITES["paper"]}
    expected = {"mmlu": 57, "mmlu-pro": 14, "bbh": 27, "math": 7, "ceval": 52, "cmmlu": 67}
    assert counts == {benchmark.name: 1 for benchmark in SUITES["paper"]} | expected


def test_the_documentation_lists_every_benchmark(manager):
    """docs/evaluation.md has a row for each benchmark: title, task, shots, metric, data set."""
    text = (ROOT / "docs" / "evaluation.md").read_text()
    for benchmark in SUITES["paper"]:
        (name,) = hub_names(manager.task_index, benchmark.task)
        shots = f"{benchmark.shots}{'' if benchmark.stated else '*'}"
        assert f"| {benchmark.title} | `{benchmark.task}` | {shots} | {benchmark.metric} | {name} |" in text


def test_benchmarks_are_selected_by_name():
    assert select_benchmarks("paper", []) == SUITES["paper"]
    assert [benchmark.name for benchmark in select_benchmarks("paper", ["gsm8k", "mmlu"])] == ["mmlu", "gsm8k"]
    assert select_benchmarks("heldout", []) == ()


@pytest.fixture(scope="module")
def ready(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "hf"
    make_ready(tiny_run.folder, folder)
    return folder


BAD_WORDS = {
    "a suite with a typo": (["--suite", "papr"], "did you mean paper? Accepted are paper, offline, heldout"),
    "a task with a typo": (["--suite", "paper", "--tasks", "mmlu,human_evl"], "did you mean humaneval?"),
    "a task of another suite": (
        ["--suite", "offline", "--tasks", "mmlu"],
        "'mmlu', which is in --suite paper: accepted in offline are choice, recall, code, text",
    ),
    "a task like nothing": (["--suite", "paper", "--tasks", "zzz"], "'zzz': accepted are mmlu, mmlu-pro"),
    "a task of held-out text": (["--suite", "heldout", "--tasks", "mmlu"], "no tasks, give --data"),
    "a backend": (["--backend", "vlm"], "accepted are transformers, vllm"),
    "a dtype": (["--dtype", "float8"], "accepted are auto, float32"),
    "no item": (["--limit", "0"], "--limit is 0: it must be at least 1"),
    "no batch": (["--batch-size", "0"], "--batch-size is 0"),
    "no data folder": (["--data-dir", "nowhere"], "--data-dir is nowhere: no such folder"),
    "held-out text without data": (["--suite", "heldout"], "needs --data"),
    "data for another suite": (["--data", "x"], "--data is for --suite heldout"),
    "a length for another suite": (["--sequence-length", "9"], "--sequence-length is for --suite heldout"),
    "a limit of held-out text": (["--suite", "heldout", "--data", "x", "--limit", "9"], "reads all of its text"),
    "code that is not allowed": (["--tasks", "choice,code"], "code executes code that the model writes"),
    "held-out text by vLLM": (["--suite", "heldout", "--data", "x", "--backend", "vllm"], "runs with transformers"),
    "a long answer": (
        ["--suite", "paper", "--tasks", "gsm8k"],
        "has a context of 64 tokens, GSM8K lets it generate 256",
    ),
}


@pytest.mark.parametrize("options, words", BAD_WORDS.values(), ids=BAD_WORDS.keys())
def test_bad_options(ready, refuses, tmp_path, options, words, tmp_path_factory):
    if "gsm8k" in options:
        options = [*options, "--data-dir", write_gsm8k(tmp_path_factory.mktemp("data"))]
    refuses(["eval", ready, "--out", tmp_path / "out", *options], words)


def test_an_output_path_that_is_a_file(ready, refuses, tmp_path):
    (tmp_path / "out").touch()
    refuses(["eval", ready, "--out", tmp_path / "out"], "out: it is a file")


def test_folders_without_a_model(ready, refuses, tmp_path):
    refuses(["eval", tmp_path / "none"], "none", "no config.json")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    refuses(["eval", tmp_path / "bare"], "no tokenizer_config.json")
    refuses(["eval", ready, ready], "given twice")
    (tmp_path / "bare" / "tokenizer_config.json").write_text("{}")
    refuses(["eval", tmp_path / "bare", "--card"], "was not written by `moonlight export`")
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "llama"}')
    refuses(["eval", tmp_path / "bare"], "bare cannot be loaded with transformers: ")
    (tmp_path / "bare" / "config.json").write_text("[]")
    refuses(["eval", tmp_path / "bare"], "config.json", "corrupt")


def test_missing_data_sets_in_a_folder(ready, refuses, tmp_path):
    """The error names the data set, its folder and the download command, before the model loads."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    command = ["eval", ready, "--suite", "paper", "--tasks", "mmlu,cmath", "--data-dir", data, "--out", out]
    download = f"hf download cais/mmlu --repo-type dataset --local-dir {data}/cais/mmlu"
    refuses(
        command, "MMLU needs the data set cais/mmlu", f"put it into {data / 'cais/mmlu'}", download, "weitianwen/cmath"
    )
    (data / "cais" / "mmlu").mkdir(parents=True)
    (data / "weitianwen" / "cmath").mkdir(parents=True)
    refuses(command, "MMLU", f"{data / 'cais/mmlu'} is not the data set cais/mmlu", download)


def test_missing_data_sets_without_a_network(ready, tmp_path):
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
    arguments = ["eval", ready, "--suite", "paper", "--tasks", "gsm8k,math,cmath", "--out", tmp_path / "out"]
    code, _, err = run_command(*arguments, env=env)
    words = ["GSM8K needs the data set openai/gsm8k", "hf download openai/gsm8k", "--data-dir DIR"]
    words += ["also needed, and not tried: EleutherAI/hendrycks_math, weitianwen/cmath"]
    check_line(code, err, words)
    assert not (tmp_path / "out").exists()


def test_no_two_benchmarks_share_a_name():
    names = [benchmark.name for suite in SUITES.values() for benchmark in suite]
    assert len(names) == len(set(names))
