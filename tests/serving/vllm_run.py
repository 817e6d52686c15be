"""vLLM, run by its own Python.

python vllm_run.py offline FOLDER REFERENCE.json ANSWERS.json     greedy generation without a server
python vllm_run.py serve FOLDER PORT                              the OpenAI-compatible server
"""

import json
import os
import sys

from prompts import NEW_TOKENS

COMPILATION = {"custom_ops": ["-rotary_embedding"]}
"""Disable vLLM 0.32's compiled CPU RoPE, which rotates the wrong queries with more than one head."""


def offline(folder: str, reference: str, answers: str) -> None:
    import vllm

    with open(reference, encoding="utf-8") as file:
        prompts = [prompt["ids"] for prompt in json.load(file)["prompts"]]
    engine = vllm.LLM(folder, dtype="float32", enforce_eager=True, compilation_config=COMPILATION)
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0),
    )
    results = []
    for output in outputs:
        (answer,) = output.outputs
        chosen = [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        results.append({"new_ids": list(answer.token_ids), "logprobs": chosen})
    with open(answers, "w", encoding="utf-8") as file:
        json.dump({"version": vllm.__version__, "prompts": results}, file)


def serve(folder: str, port: str) -> None:
    flags = f"--served-model-name moonlight --host 127.0.0.1 --port {port} --dtype float32 --enforce-eager".split()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *flags]
    os.execv(sys.executable, [*command, "--compilation-config", json.dumps(COMPILATION)])


if __name__ == "__main__":
    {"offline": offline, "serve": serve}[sys.argv[1]](*sys.argv[2:])
