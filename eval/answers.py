"""Scores of answers to the tasks in `eval/tasks/`. The harness calls these functions by name from the YAML files."""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from eval.sandbox import run_code

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def score_completion(document: Mapping[str, Any], answers: Sequence[str]) -> dict[str, int]:
    """Return pass@1 of a function that continues `prompt`, in HumanEval format: `test` defines check(function)."""
    program = f"{document['prompt']}{answers[0]}\n\n{document['test']}\n\ncheck({document['entry_point']})\n"
    return {"pass@1": int(run_code(program).passed)}


def score_program(document: Mapping[str, Any], answers: Sequence[str]) -> dict[str, int]:
    """Return pass@1 of a full program, in MBPP format: every assertion in `test_list` must pass after it."""
    parts = [document.get("test_setup_code") or "", answers[0], *document["test_list"]]
    return {"pass@1": int(run_code("\n".join(parts) + "\n").passed)}


def score_number(document: Mapping[str, Any], answers: Sequence[str]) -> dict[str, int]:
    """Return exact_match 1 if the last number of the answer equals `golden`, in any notation, else 0."""
    expected, actual = last_number(str(document["golden"])), last_number(answers[0])
    return {"exact_match": int(expected is not None and actual == expected)}


def last_number(text: str) -> Fraction | None:
    """Return the last number in a text, such as 1,234 or 0.5 or 3/4 or -2; None without a number."""
    for match in reversed(_NUMBER.findall(text)):
        numerator, _, denominator = match.replace(",", "").partition("/")
        if not denominator or int(denominator):
            return Fraction(numerator) / int(denominator or 1)
    return None


def mbpp_examples(documents: Any) -> Any:
    """Return the three standard few-shot examples: problems 2, 3 and 4 of the data set."""
    return documents.filter(lambda document: document["task_id"] in (2, 3, 4))
