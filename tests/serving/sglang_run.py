"""SGLang with a CPU shim, run by its own Python with `sglang_shim` on the path.

python sglang_run.py offline FOLDER REFERENCE.json ANSWERS.json     greedy generation without a server
python sglang_run.py serve FOLDER PORT                              the OpenAI-compatible server
"""

import json
import sys

import sglang_on_cpu  # noqa: F401  (before SGLang)

# isort: split

import sglang
from prompts import NEW_TOKENS
from sglang.launch_server import run_server
from sglang.srt.server_args import ServerArgs

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


def offline(folder: str, reference: str, answers: str) -> None:
    with open(reference, encoding="utf-8") as file:
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
    with open(answers, "w", encoding="utf-8") as file:
        json.dump({"version": sglang.__version__, "prompts": results}, file)


def serve(folder: str, port: str) -> None:
    run_server(
        ServerArgs(model_path=folder, served_model_name="moonlight", host="127.0.0.1", port=int(port), **OPTIONS)
    )


# SGLang's child processes import this file under another name.
if __name__ == "__main__":
    {"offline": offline, "serve": serve}[sys.argv[1]](*sys.argv[2:])
