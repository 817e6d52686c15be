"""How answers to our own tasks are scored. The harness calls these by name from the YAML files in `eval/tasks/`."""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from eval.sandbox import run_code

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def score_completion(document: Mapping[str, Any], answers: Sequence[str]) -> dict[str, int]:
    """pass@1 of a function that goes on from its `prompt`, as HumanEval gives it: `test` defines check(function)."""
    program = f"{document['prompt']}{answers[0]}\n\n{document['test']}\n\ncheck({document['entry_point']})\n"
    return {"pass@1": int(run_code(program).passed)}


def score_program(document: Mapping[str, Any], answers: Sequence[str]) -> dict[str, int]:
    """pass@1 of a whole program, as MBPP asks for it: every line of `test_list` must hold after it."""
    parts = [document.get("test_setup_code") or "", answers[0], *document["test_list"]]
    return {"pass@1": int(run_code("\n".join(parts) + "\n").passed)}


def score_number(document: Mapping[str, Any], answers: Sequence[str]) -> dict[str, int]:
    """Whether the last number of the answer is `golden`, in whatever way both are written."""
    wanted, found = last_number(str(document["golden"])), last_number(answers[0])
    return {"exact_match": int(wanted is not None and found == wanted)}


def last_number(text: str) -> Fraction | None:
    """The last number in a text: 1,234 and 0.5 and 3/4 and -2; None if there is none."""
    for found in reversed(_NUMBER.findall(text)):
        numerator, _, denominator = found.replace(",", "").partition("/")
        if not denominator or int(denominator):
            return Fraction(numerator) / int(denominator or 1)
    return None


def mbpp_examples(documents: Any) -> Any:
    """The three examples that the field shows: problems 2, 3 and 4 of the data set."""
    return documents.filter(lambda document: document["task_id"] in (2, 3, 4))
