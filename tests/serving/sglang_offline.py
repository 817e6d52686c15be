"""Greedy generation by SGLang with a CPU shim, without a server: python sglang_offline.py FOLDER ANSWERS.json OUT.json."""

import json
import sys

import sglang_on_cpu  # noqa: F401  (before SGLang)

import sglang
from prompts import NEW_TOKENS


def main(folder: str, answers: str, out: str) -> None:
    with open(answers, encoding="utf-8") as file:
        prompts = [prompt["ids"] for prompt in json.load(file)["prompts"]]
    engine = sglang.Engine(model_path=folder, **OPTIONS)
    try:
        outputs = engine.generate(
            input_ids=prompts,
            sampling_params={"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
            return_logprob=True,
        )
    finally:
        engine.shutdown()
    results = []
    for output in outputs:
        chosen = output["meta_info"]["output_token_logprobs"]
        results.append({"new_ids": [token for _, token, _ in chosen], "logprobs": [value for value, _, _ in chosen]})
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"version": sglang.__version__, "results": results}, file)


OPTIONS = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "disable_radix_cache": True,
    "disable_overlap_schedule": True,
    "max_total_tokens": 4096,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
