"""The serving proof, `make serve-test`: one exported checkpoint, loaded and served by transformers, vLLM and SGLang.

All compute in float32 on CPU, and must give what transformers gives: the same greedy ids, log-probabilities within
1e-4, the same text over HTTP, and a chat answer that ends by itself; vLLM as a backend of `moonlight eval` the same
answers to the offline suite, item by item. A model that `moonlight sft` tuned must answer held-out conversations over
HTTP as in transformers, each ended by its end token. On a copy of the checkpoint whose config.json lacks `scoring_func`
the same comparison must fail. SGLang has no build of its kernels for CPU, so this is SGLang with a CPU shim: its
loader, routing, absorbed latent attention, scheduler and server, not its GPU kernels.

Everything is written to runs/serve-test/, logs in runs/serve-test/logs/. Exits 1 on any difference.
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
PLACE = ROOT / "runs" / "serve-test"
LOGS = PLACE / "logs"
REFERENCE = PLACE / "reference.json"
INSTRUCT = PLACE / "instruct.json"
MIN_PROMPT_TOKENS = 4
"""A prompt of one token is answered rightly even with a broken RoPE."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
HERE_TOO = {"PYTHONPATH": str(ROOT), **OFFLINE}


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server in a virtual environment of its own, and the script that runs it: see its docstring for arguments."""

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
    """Conversations that the tuned model answered as in transformers, ended by its end token."""
    evaluated: bool = True
    """Whether the offline suite gives what it gives through transformers; `suite` says how nearly."""
    suite: str = "not a backend"
    noticed: bool = False
    """Whether the comparison failed on the damaged copy, as it must; `control` says how."""
    control: str = "?"
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        all_equal = self.ids_equal == self.texts_equal == len(PROMPTS) and self.chat_equal
        all_equal = all_equal and self.instruct_equal == INSTRUCT_CHATS and self.evaluated
        return all_equal and self.difference <= MAX_LOGPROB_DIFFERENCE and self.finish_reason == "stop" and self.noticed


def make_checkpoint() -> dict[str, Any]:
    """Checkpoint, exports and the answers of transformers, after a proof that the export is the model we trained."""
    run([sys.executable, HERE / "checkpoint.py", PLACE], LOGS / "checkpoint.log", HERE_TOO)
    verify = [sys.executable, "-m", "moonlight.cli", "verify", PLACE / "run", PLACE / "hf"]
    run(verify, LOGS / "verify.log", HERE_TOO)
    run([sys.executable, HERE / "reference.py", PLACE / "hf", REFERENCE], LOGS / "reference.log", HERE_TOO)
    reference = json.loads(REFERENCE.read_text())
    for prompt in reference["prompts"]:
        assert len(prompt["ids"]) >= MIN_PROMPT_TOKENS and len(prompt["new_ids"]) == NEW_TOKENS, prompt
        assert prompt["margin"] > MAX_LOGPROB_DIFFERENCE, f"a tie decides the reference: {prompt}"
    assert len(reference["chat"]["new_ids"]) == CHAT_ANSWER_TOKENS + 1 and reference["chat"]["text"], reference["chat"]
    run([sys.executable, HERE / "instruct.py", PLACE, INSTRUCT], LOGS / "instruct.log", HERE_TOO)
    reference["instruct"] = json.loads(INSTRUCT.read_text())["chats"]
    assert len(reference["instruct"]) == INSTRUCT_CHATS
    for chat in reference["instruct"]:
        assert chat["ended"] and chat["text"] and chat["margin"] > MAX_LOGPROB_DIFFERENCE, chat
    return reference


def compare(wanted: list[dict], found: list[dict]) -> tuple[int, float]:
    """Prompts whose greedy ids are equal, and the largest difference of log-probability over all prompts."""
    equal = sum(there["new_ids"] == here["new_ids"] for there, here in zip(found, wanted, strict=True))
    differences = (
        abs(a - b)
        for there, here in zip(found, wanted, strict=True)
        for a, b in zip(there["logprobs"], here["logprobs"], strict=True)
    )
    return equal, max(differences)


def generate(server: Server, folder: str) -> dict[str, Any]:
    """Version and answers of a server's engine without HTTP."""
    answers = PLACE / f"{server.name}-{folder}.json"
    log = LOGS / f"{server.name}-offline-{folder}.log"
    run(server.command("offline", PLACE / folder, REFERENCE, answers), log, server.environment)
    return json.loads(answers.read_text())


def check_offline(server: Server, reference: dict[str, Any], row: Row) -> None:
    answers = generate(server, "hf")
    row.version = answers["version"]
    row.ids_equal, row.difference = compare(reference["prompts"], answers["prompts"])


def check_http(server: Server, reference: dict[str, Any], row: Row) -> None:
    """Completions and chat over the OpenAI-compatible protocol, prompts given as text."""
    log, port = LOGS / f"{server.name}-server.log", free_port()
    url = f"http://127.0.0.1:{port}"
    with started(server.command("serve", PLACE / "hf", port), log, server.environment) as process:
        wait_until_ready(process, f"{url}/health", log)
        greedy = {"model": "moonlight", "temperature": 0}
        for text, wanted in zip(PROMPTS, reference["prompts"], strict=True):
            body = {**greedy, "prompt": text, "max_tokens": NEW_TOKENS, "ignore_eos": True}
            answer = post(f"{url}/v1/completions", body, log)
            same_prompt = answer["usage"]["prompt_tokens"] == len(wanted["ids"])
            row.texts_equal += same_prompt and answer["choices"][0]["text"] == wanted["text"]
        wanted = reference["chat"]
        body = {**greedy, "messages": CHAT, "max_tokens": 4 * NEW_TOKENS}
        answer = post(f"{url}/v1/chat/completions", body, log)
    (choice,) = answer["choices"]
    same_prompt = answer["usage"]["prompt_tokens"] == len(wanted["ids"])
    row.chat_equal = same_prompt and choice["message"]["content"] == wanted["text"]
    row.finish_reason = choice["finish_reason"]
    assert "<|" not in choice["message"]["content"], choice


def check_instruct(server: Server, reference: dict[str, Any], row: Row) -> None:
    """The tuned model answers conversations over HTTP, and each answer ends by itself."""
    log, port = LOGS / f"{server.name}-instruct.log", free_port()
    url = f"http://127.0.0.1:{port}"
    with started(server.command("serve", PLACE / "instruct", port), log, server.environment) as process:
        wait_until_ready(process, f"{url}/health", log)
        for wanted in reference["instruct"]:
            body = {"model": "moonlight", "temperature": 0, "max_tokens": INSTRUCT_ANSWER_TOKENS}
            answer = post(f"{url}/v1/chat/completions", {**body, "messages": wanted["messages"]}, log)
            (choice,) = answer["choices"]
            same_prompt = answer["usage"]["prompt_tokens"] == wanted["prompt_tokens"]
            same_text = choice["message"]["content"] == wanted["text"]
            row.instruct_equal += same_prompt and same_text and choice["finish_reason"] == "stop"


def check_evaluation(server: Server, row: Row) -> None:
    """The offline suite through lm-evaluation-harness, with transformers in this Python and with the server's own."""
    row.evaluated = False
    outs = {name: PLACE / f"evaluation-{name}" for name in ("transformers", server.name)}
    pythons = {"transformers": sys.executable, server.name: server.command()[0]}
    for name, out in outs.items():
        words = [pythons[name], *evaluation.command(PLACE / "hf", name, out)]
        # Without the tests: transformers and vLLM look for a package `kernels`, which must not be ours.
        environment = server.environment | HERE_TOO | {"PYTHONPATH": str(ROOT)}
        run(words, LOGS / f"evaluation-{name}.log", environment)
    row.evaluated, row.suite = evaluation.compare(*outs.values())


def check_control(server: Server, reference: dict[str, Any], row: Row) -> None:
    """The comparison must fail without `scoring_func`, by wrong answers or by an error that names it."""
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
    table.add_row("transformers", reference["version"], *["reference"] * 5, ends_by, _right(reference), "", "")
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


def _right(reference: dict[str, Any]) -> str:
    right = sum(chat["text"] == chat["right"] for chat in reference["instruct"])
    return f"{right} of {INSTRUCT_CHATS} right"


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` runs and servers end
    shutil.rmtree(PLACE, ignore_errors=True)
    LOGS.mkdir(parents=True)
    begin = time.monotonic()
    print("checkpoint, export, proof and transformers ...", flush=True)
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
