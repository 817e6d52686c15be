"""Greedy generation by vLLM without a server: python vllm_offline.py FOLDER ANSWERS.json OUT.json."""

import json
import sys

import vllm
from prompts import NEW_TOKENS


def main(folder: str, answers: str, out: str) -> None:
    with open(answers, encoding="utf-8") as file:
        prompts = [prompt["ids"] for prompt in json.load(file)["prompts"]]
    engine = vllm.LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        # vLLM 0.32's compiled rope for CPU turns wrong queries when there is more than one head, and says nothing.
        compilation_config={"custom_ops": ["-rotary_embedding"]},
    )
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0),
    )
    results = []
    for output in outputs:
        (answer,) = output.outputs
        chosen = [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        results.append({"new_ids": list(answer.token_ids), "logprobs": chosen})
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"version": vllm.__version__, "results": results}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
