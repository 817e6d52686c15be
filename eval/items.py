"""Answers of a model to the items of a benchmark, one JSON object per line."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from eval.suites import Benchmark


def sample_items(benchmark: Benchmark, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the samples of the harness as task, item, question, prompt checksum, target, answer and score.

    The question is the prompt without its examples. The answer is the scored text. For multiple choice, it is the index
    of the most likely choice, with the log-likelihoods in nats. A text has only its log-likelihood.
    """
    metric = benchmark.metric.partition(",")[0]
    return [_item(metric, sample) for sample in samples]


def _item(metric: str, sample: dict[str, Any]) -> dict[str, Any]:
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
