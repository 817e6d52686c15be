"""Small versions of the datasets of the paper's benchmarks: their columns and splits, with synthetic rows."""

import json

LETTERS = "ABCD"


def _choices(number, names=LETTERS):
    return {letter: f"{number + 7 * index} {letter.lower()}" for index, letter in enumerate(names)}


def _mmlu(number, config):
    letter = LETTERS[number % 4]
    return {
        "question": f" Which is {letter} of {config} {number}? ",
        "subject": config,
        "choices": list(_choices(number).values()),
        "answer": number % 4,
    }


MMLU_PRO = ["biology", "business", "chemistry", "computer science", "economics", "engineering", "health"]
MMLU_PRO += ["history", "law", "math", "other", "philosophy", "physics", "psychology"]


def _mmlu_pro(number, config):
    letter = "ABCDEFGHIJ"[number % 10]
    return {
        "question_id": number,
        "question": f"Which is {letter} of {number}?",
        "options": list(_choices(number, "ABCDEFGHIJ").values()),
        "answer": letter,
        "answer_index": number % 10,
        "cot_content": f"A: Let's think step by step. It is written there. The answer is ({letter}).",
        "category": MMLU_PRO[number % len(MMLU_PRO)],
        "src": "here",
    }


def _bbh(number, config):
    return {"input": f"{config} number {number}", "target": ["True", "(A)", "]", "a b c", "valid"][number % 5]}


def _triviaqa(number, config):
    names = [f"Anna the {number}th", f"Queen Anna {number}"]
    return {
        "question": f"Who ruled in the year {number}",
        "question_id": str(number),
        "answer": {"aliases": names, "value": names[0], "normalized_aliases": [name.lower() for name in names]},
    }


def _humaneval(number, config):
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f'def add_{number}(a: int) -> int:\n    """Add {number} to a."""\n',
        "canonical_solution": f"    return a + {number}\n",
        "test": f"def check(f):\n    assert f(1) == {number + 1}\n    assert f(0) == {number}\n",
        "entry_point": f"add_{number}",
    }


def _mbpp(number, config):
    return {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"def add(a):\r\n  return a + {number}",
        "test_list": [f"assert add({a}) == {a + number}" for a in range(3)],
        "test_setup_code": "",
        "challenge_test_list": [],
    }


def _gsm8k(number, config):
    return {
        "question": f"Anna has {number} apples and buys {number + 1}. How many has she?",
        "answer": f"She has {number} + {number + 1} = <<{number}+{number + 1}={2 * number + 1}>>{2 * number + 1}.\n"
        f"#### {2 * number + 1}",
    }


def _math(number, config):
    return {
        "problem": f"Halve ${number}$ ({config}).",
        "level": "Level 1",
        "type": config,
        "solution": f"We divide, and get $\\boxed{{\\frac{{{number}}}{{2}}}}$.",
    }


def _cmath(number, config):
    return {
        "grade": 2,
        "question": f"{number}加2等于多少？",
        "golden": str(number + 2),
        "reasoning_step": 1,
        "num_digits": 1,
    }


def _ceval(number, config):
    return {
        "id": number,
        "question": f"第{number}题",
        **_choices(number),
        "answer": LETTERS[number % 4],
        "explanation": "",
    }


def _cmmlu(number, config):
    return {"Question": f"{config}第{number}题", **_choices(number), "Answer": LETTERS[number % 4]}


ROWS = {
    "mmlu": _mmlu,
    "mmlu-pro": _mmlu_pro,
    "bbh": _bbh,
    "triviaqa": _triviaqa,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
    "gsm8k": _gsm8k,
    "math": _math,
    "cmath": _cmath,
    "ceval": _ceval,
    "cmmlu": _cmmlu,
}
"""Name of a benchmark -> function of a number and a dataset configuration that returns a row."""


def write_set(data_dir, name, configs):
    """Write the dataset of a benchmark in the layout of `hf download`.

    Args:
        configs: the harness's configuration of each of the benchmark's tasks.
    """
    folder = data_dir / configs[0]["dataset_path"]
    card = ["---", "configs:"]
    for config in dict.fromkeys(config.get("dataset_name") or "default" for config in configs):
        card += [f"- config_name: {config}", "  data_files:"]
        keys = ("test_split", "validation_split", "training_split", "fewshot_split")
        splits = sorted({task[key] for task in configs for key in keys if task.get(key)})
        for start, split in enumerate(splits):
            path = folder / config / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            # Enough for five examples of each of MMLU-pro's categories; MBPP's examples are its problems 2 to 4.
            num_rows = 5 * len(MMLU_PRO) if name == "mmlu-pro" else 6
            first = {"prompt": 1, "test": 11}[split] if name == "mbpp" else 100 * start
            rows = [ROWS[name](number, config) for number in range(first, first + num_rows)]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            card += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
