"""Compare `moonlight eval --suite offline` through transformers and through vLLM, item by item."""

import json
from pathlib import Path
from typing import Any

MAX_LOGLIKELIHOOD_DIFFERENCE = 1e-3
"""In nats, for a full answer or text; a text is hundreds of tokens."""
MAX_SCORE_DIFFERENCE = 1e-5
"""In bits per byte. Fractions of right answers must be equal."""


def command(folder: Path, backend: str, out: Path) -> list[Any]:
    """Return the arguments for the backend's Python."""
    return ["-m", "moonlight.cli", "eval", folder, "--allow-code", "--backend", backend, "--out", out]


def _read(out: Path) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Return the result and items of every benchmark of the only model in `out`."""
    (model,) = json.loads((out / "results.json").read_text())["models"]
    folder = out / model["label"]
    return {
        name: (entry, [json.loads(line) for line in (folder / f"{name}.items.jsonl").read_text().splitlines()])
        for name, entry in model["results"].items()
    }


def compare(reference: Path, candidate: Path) -> tuple[bool, str]:
    """Return whether two evaluations agree, and a summary of the differences."""
    expected, actual = _read(reference), _read(candidate)
    assert expected.keys() == actual.keys() == {"choice", "recall", "code", "text"}
    items = different = 0
    largest, same_scores = 0.0, True
    for name, (entry, answers) in expected.items():
        other, other_answers = actual[name]
        bound = MAX_SCORE_DIFFERENCE if name == "text" else 0
        same_scores &= abs(entry["score"] - other["score"]) <= bound
        assert len(answers) == len(other_answers) == entry["items"]
        for answer, other_answer in zip(answers, other_answers, strict=True):
            items += 1
            both = [
                {key: value for key, value in one.items() if key != "loglikelihoods"} for one in (answer, other_answer)
            ]
            different += both[0] != both[1]
            pairs = zip(answer.get("loglikelihoods", []), other_answer.get("loglikelihoods", []), strict=True)
            largest = max([largest, *(abs(a - b) for a, b in pairs)])
    passed = same_scores and not different and largest <= MAX_LOGLIKELIHOOD_DIFFERENCE
    return passed, f"{items - different} of {items} items, by {largest:.1e}{'' if same_scores else ', OTHER SCORES'}"
