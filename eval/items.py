"""What a model answered to each item of a benchmark, one JSON object a line."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from eval.suites import Benchmark


def sample_items(benchmark: Benchmark, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The harness's samples in short: task, number, question, answer, target, score, and a checksum of the prompt.

    The question is the prompt without its examples.
    An answer is the text that counted; of a multiple choice the number of the likeliest choice, with the
    log-likelihoods in nats; of a text its log-likelihood alone.
    """
    return [_item(benchmark, sample) for sample in samples]


def _item(benchmark: Benchmark, sample: dict[str, Any]) -> dict[str, Any]:
    metric = benchmark.metric.partition(",")[0]
    prompt = json.dumps([[word for word in words if isinstance(word, str)] for words in sample["arguments"]])
    item: dict[str, Any] = {
        "task": sample["task"],
        "item": sample["doc_id"],
        "question": sample["question"],
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest()[:16],
        "target": sample["target"],
    }
    responses = [response[0] for response in sample["resps"]]
    if isinstance(responses[0], str):
        answer = sample["filtered_resps"][0]
        return item | {"answer": answer, "text": responses[0], "score": sample[metric]}
    if isinstance(responses[0], tuple | list):
        loglikelihoods = [float(value) for value, _ in responses]
        answer = max(range(len(loglikelihoods)), key=loglikelihoods.__getitem__)
        return item | {"answer": answer, "loglikelihoods": loglikelihoods, "score": sample[metric]}
    return item | {"loglikelihoods": [float(responses[0])]}


def to_lines(items: Iterable[dict[str, Any]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
