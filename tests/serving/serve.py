"""The serving test, `make serve-test`: transformers, vLLM and SGLang load and serve one exported checkpoint.

All compute in float32 on CPU and must agree with transformers: the same greedy ids, log-probabilities within 1e-4, the
same text over HTTP, and a chat answer that stops at its end token. vLLM as a backend of `moonlight eval` must give the
same answers to the offline suite, item by item. A model tuned by `moonlight sft` must answer held-out conversations
over HTTP as in transformers, each stopped by its end token. On a copy of the checkpoint whose config.json lacks
`scoring_func` the same comparison must fail.

SGLang has no CPU build of its kernels, so the test runs SGLang with a CPU shim. It covers SGLang's loader, routing,
absorbed latent attention, scheduler and server, but not its GPU kernels.

The test writes to runs/serve-test/, with logs in runs/serve-test/logs/, and exits with 1 on any difference.
"""

import json
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluation
from processes import Failed, free_port, post, run, started, wait_until_ready
from prompts import (
    CHAT,
    CHAT_ANSWER_TOKENS,
    INSTRUCT_ANSWER_TOKENS,
    INSTRUCT_CHATS,
    MAX_LOGPROB_DIFFERENCE,
    NEW_TOKENS,
    PROMPTS,
)
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
OUTPUT = ROOT / "runs" / "serve-test"
LOGS = OUTPUT / "logs"
REFERENCE = OUTPUT / "reference.json"
INSTRUCT = OUTPUT / "instruct.json"
MIN_PROMPT_TOKENS = 4
"""With one token, even a broken RoPE gives right answers."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
OUR_ENVIRONMENT = {"PYTHONPATH": str(ROOT), **OFFLINE}


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server in its own virtual environment, run by `<name>_run.py`: see that file for arguments."""

    title: str
    name: str
    environment: dict[str, str]

    def command(self, *arguments: Any) -> list[Any]:
        return [ROOT / ".venvs" / self.name / "bin" / "python", HERE / f"{self.name}_run.py", *arguments]


SERVERS = (
    Server(
        title="vLLM",
        name="vllm",
        environment={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **OFFLINE},
    ),
    Server(
        title="SGLang with a CPU shim",
        name="sglang",
        environment={"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": str(HERE / "sglang_shim"), **OFFLINE},
    ),
)


@dataclass(kw_only=True)
class Row:
    """One line of the final table."""

    title: str
    version: str = "?"
    ids_equal: int = 0
    difference: float = float("inf")
    texts_equal: int = 0
    chat_equal: bool = False
    finish_reason: str = "?"
    instruct_equal: int = 0
    """Number of conversations that the tuned model answered as in transformers, stopped by its end token."""
    evaluated: bool = True
    """Whether the offline suite agrees with transformers; `suite` has the differences."""
    suite: str = "not a backend"
    noticed: bool = False
    """Whether the comparison failed on the broken copy, as required; `control` has the reason."""
    control: str = "?"
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        all_equal = self.ids_equal == self.texts_equal == len(PROMPTS) and self.chat_equal
        all_equal = all_equal and self.instruct_equal == INSTRUCT_CHATS and self.evaluated
        return all_equal and self.difference <= MAX_LOGPROB_DIFFERENCE and self.finish_reason == "stop" and self.noticed


def make_checkpoint() -> dict[str, Any]:
    """Make the checkpoint, its verified export and the tuned model. Return the answers of transformers."""
    run([sys.executable, HERE / "checkpoint.py", OUTPUT], LOGS / "checkpoint.log", OUR_ENVIRONMENT)
    verify = [sys.executable, "-m", "moonlight.cli", "verify", OUTPUT / "run", OUTPUT / "hf"]
    run(verify, LOGS / "verify.log", OUR_ENVIRONMENT)
    run([sys.executable, HERE / "reference.py", OUTPUT / "hf", REFERENCE], LOGS / "reference.log", OUR_ENVIRONMENT)
    reference = json.loads(REFERENCE.read_text())
    for prompt in reference["prompts"]:
        assert len(prompt["ids"]) >= MIN_PROMPT_TOKENS and len(prompt["new_ids"]) == NEW_TOKENS, prompt
        assert prompt["margin"] > MAX_LOGPROB_DIFFERENCE, f"the two largest logits are too close: {prompt}"
    assert len(reference["chat"]["new_ids"]) == CHAT_ANSWER_TOKENS + 1 and reference["chat"]["text"], reference["chat"]
    run([sys.executable, HERE / "instruct.py", OUTPUT, INSTRUCT], LOGS / "instruct.log", OUR_ENVIRONMENT)
    reference["instruct"] = json.loads(INSTRUCT.read_text())["chats"]
    assert len(reference["instruct"]) == INSTRUCT_CHATS
    for chat in reference["instruct"]:
        assert chat["ended"] and chat["text"] and chat["margin"] > MAX_LOGPROB_DIFFERENCE, chat
    return reference


def compare(expected: list[dict], actual: list[dict]) -> tuple[int, float]:
    """Return the number of prompts with equal greedy ids, and the largest log-probability difference."""
    equal = sum(a["new_ids"] == b["new_ids"] for a, b in zip(actual, expected, strict=True))
    differences = (
        abs(a - b)
        for answer, reference in zip(actual, expected, strict=True)
        for a, b in zip(answer["logprobs"], reference["logprobs"], strict=True)
    )
    return equal, max(differences)


def generate(server: Server, folder: str) -> dict[str, Any]:
    """Return the version and the answers of a server's engine, without HTTP."""
    answers = OUTPUT / f"{server.name}-{folder}.json"
    log = LOGS / f"{server.name}-offline-{folder}.log"
    run(server.command("offline", OUTPUT / folder, REFERENCE, answers), log, server.environment)
    return json.loads(answers.read_text())


def check_offline(server: Server, reference: dict[str, Any], row: Row) -> None:
    answers = generate(server, "hf")
    row.version = answers["version"]
    row.ids_equal, row.difference = compare(reference["prompts"], answers["prompts"])


def check_http(server: Server, reference: dict[str, Any], row: Row) -> None:
    """Check completions and chat over the OpenAI-compatible protocol, with prompts as text."""
    log, port = LOGS / f"{server.name}-server.log", free_port()
    url = f"http://127.0.0.1:{port}"
    with started(server.command("serve", OUTPUT / "hf", port), log, server.environment) as process:
        wait_until_ready(process, f"{url}/health", log)
        greedy = {"model": "moonlight", "temperature": 0}
        for text, expected in zip(PROMPTS, reference["prompts"], strict=True):
            body = {**greedy, "prompt": text, "max_tokens": NEW_TOKENS, "ignore_eos": True}
            answer = post(f"{url}/v1/completions", body, log)
            same_prompt = answer["usage"]["prompt_tokens"] == len(expected["ids"])
            row.texts_equal += same_prompt and answer["choices"][0]["text"] == expected["text"]
        expected = reference["chat"]
        body = {**greedy, "messages": CHAT, "max_tokens": 4 * NEW_TOKENS}
        answer = post(f"{url}/v1/chat/completions", body, log)
    (choice,) = answer["choices"]
    same_prompt = answer["usage"]["prompt_tokens"] == len(expected["ids"])
    row.chat_equal = same_prompt and choice["message"]["content"] == expected["text"]
    row.finish_reason = choice["finish_reason"]
    assert "<|" not in choice["message"]["content"], choice


def check_instruct(server: Server, reference: dict[str, Any], row: Row) -> None:
    """Check the tuned model's answers over HTTP. Each must stop at its end token."""
    log, port = LOGS / f"{server.name}-instruct.log", free_port()
    url = f"http://127.0.0.1:{port}"
    with started(server.command("serve", OUTPUT / "instruct", port), log, server.environment) as process:
        wait_until_ready(process, f"{url}/health", log)
        for expected in reference["instruct"]:
            body = {"model": "moonlight", "temperature": 0, "max_tokens": INSTRUCT_ANSWER_TOKENS}
            answer = post(f"{url}/v1/chat/completions", {**body, "messages": expected["messages"]}, log)
            (choice,) = answer["choices"]
            same_prompt = answer["usage"]["prompt_tokens"] == expected["prompt_tokens"]
            same_text = choice["message"]["content"] == expected["text"]
            row.instruct_equal += same_prompt and same_text and choice["finish_reason"] == "stop"


def check_evaluation(server: Server, row: Row) -> None:
    """Compare the offline suite through transformers in this Python and through the server's Python."""
    row.evaluated = False
    outs = {name: OUTPUT / f"evaluation-{name}" for name in ("transformers", server.name)}
    pythons = {"transformers": sys.executable, server.name: server.command()[0]}
    for name, out in outs.items():
        words = [pythons[name], *evaluation.command(OUTPUT / "hf", name, out)]
        # Leave tests/ off the path: transformers and vLLM import a package `kernels`, which must not be ours.
        environment = server.environment | OUR_ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
        run(words, LOGS / f"evaluation-{name}.log", environment)
    row.evaluated, row.suite = evaluation.compare(*outs.values())


def check_control(server: Server, reference: dict[str, Any], row: Row) -> None:
    """Check that the comparison fails without `scoring_func`, with wrong answers or an error that names it."""
    try:
        equal, difference = compare(reference["prompts"], generate(server, "broken")["prompts"])
    except Failed as error:
        if "has no attribute 'scoring_func'" not in error.log.read_text(errors="replace"):
            raise
        row.noticed, row.control = True, "error: no scoring_func"
    else:
        row.noticed = equal < len(PROMPTS) and difference > MAX_LOGPROB_DIFFERENCE
        row.control = f"{len(PROMPTS) - equal} of {len(PROMPTS)} wrong, by {difference:.2g}"


def print_table(reference: dict[str, Any], rows: list[Row]) -> None:
    tokens = f"{len(PROMPTS)} prompts x {NEW_TOKENS} tokens"
    columns = (
        "version",
        "ids equal",
        "log-probabilities differ by",
        "text equal (HTTP)",
        "offline suite",
        "chat equal",
        "chat ends by",
        "tuned chats equal",
        "without scoring_func",
        "seconds",
    )
    table = Table("server", *columns, title=f"Greedy, {tokens}")
    count = len(PROMPTS)
    ends_by = reference["chat"]["finish_reason"]
    table.add_row("transformers", reference["version"], *["reference"] * 5, ends_by, _count_right(reference), "", "")
    for row in rows:
        table.add_row(
            row.title,
            row.version,
            f"{row.ids_equal} of {count}",
            f"{row.difference:.1e}",
            f"{row.texts_equal} of {count}",
            row.suite if row.evaluated else f"NOT EQUAL: {row.suite}",
            "yes" if row.chat_equal else "NO",
            row.finish_reason,
            f"{row.instruct_equal} of {INSTRUCT_CHATS}",
            row.control if row.noticed else f"NOT NOTICED: {row.control}",
            f"{row.seconds:.0f}",
        )
    Console(width=170).print(table)


def _count_right(reference: dict[str, Any]) -> str:
    right = sum(chat["text"] == chat["right"] for chat in reference["instruct"])
    return f"{right} of {INSTRUCT_CHATS} right"


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` runs and servers end
    shutil.rmtree(OUTPUT, ignore_errors=True)
    LOGS.mkdir(parents=True)
    begin = time.monotonic()
    print("checkpoint, export, verification and transformers ...", flush=True)
    try:
        reference = make_checkpoint()
    except Failed as error:
        sys.exit(str(error))
    rows = []
    for server in SERVERS:
        row, start = Row(title=server.title), time.monotonic()
        rows.append(row)
        try:
            for check in (check_offline, check_http, check_instruct, check_control):
                print(f"{server.title}: {check.__name__.removeprefix('check_')} ...", flush=True)
                check(server, reference, row)
            if server.name == "vllm":
                print(f"{server.title}: evaluation ...", flush=True)
                check_evaluation(server, row)
        except Failed as error:
            print(f"{server.title}: {error}", file=sys.stderr)
        row.seconds = time.monotonic() - start
    print_table(reference, rows)
    passed = all(row.passed for row in rows)
    print(f"{'passed' if passed else 'FAILED'} in {time.monotonic() - begin:.0f} s; logs are in {LOGS}")
    return 0 if passed else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
