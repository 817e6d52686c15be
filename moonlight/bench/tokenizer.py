"""`moonlight bench tokenizer`: speed of text to ids, compared with sentencepiece and transformers.

Our case is the code of `moonlight data prepare`. The text consists of modules of Python's standard library, repeated;
the tokenizer is trained on some of them. The benchmark measures CPU time on one core, and wall time on all cores,
including the start of our processes. The cases take turns. The gate: every document has the same ids in every case.
"""

import os
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from moonlight.bench.report import hardware, iter_rounds, print_results, time_ratio
from moonlight.bench.startup import make_data
from moonlight.data.encode import DocumentBatch, TextEncoder, encode_all

VOCAB_SIZE = 4096
BATCH_BYTES = 1 << 19
"""Bytes of text of a batch, as in `moonlight data prepare`."""
SENTENCEPIECE_BAR, TRANSFORMERS_BAR, AIM = 0.9, 1.0, 1.0
_PARALLELISM_VARIABLE = "TOKENIZERS_PARALLELISM"

Ids = list[Any]


def bench_tokenizer(rounds: int, megabytes: int, json_path: Path | None = None) -> bool:
    """Run the benchmark on `megabytes` of text, print its table, and return whether every result passed."""
    cores = hardware("cpu").cores
    with tempfile.TemporaryDirectory(prefix="moonlight-bench-") as temporary_folder:
        _, folder = make_data(Path(temporary_folder), VOCAB_SIZE)
        batches = _batches(10**6 * megabytes)
        cases = _cases(folder, batches, cores)
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        same = True
        for round_index in iter_rounds(rounds):
            expected: Ids | None = None
            for name, call in cases.items():
                wall, cpu = time.perf_counter(), time.process_time()
                ids = call()
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                expected = expected or ids
                same = same and len(ids) == len(expected) and all(map(_is_equal, ids, expected))
                if round_index:  # the first round warms up
                    seconds[name].append(cpu if name.endswith("one core") else wall)
    tokens = sum(map(len, expected or []))
    size = sum(len(text) for batch in batches for text in batch.raw)
    bars = {"sentencepiece": SENTENCEPIECE_BAR}
    bars |= dict.fromkeys(("transformers", "transformers, one by one"), TRANSFORMERS_BAR)
    results = [
        time_ratio(f"{where}, {peer}", seconds[f"ours, {where}"], seconds[f"{peer}, {where}"], bar, same, "s", AIM)
        for where in ("one core", "all cores")
        for peer, bar in bars.items()
        if f"{peer}, {where}" in seconds
    ]
    rates = {name: statistics.median(times) for name, times in seconds.items()}
    notes = [f"{size / 1e6:.0f} MB in {tokens / 1e6:.1f} million tokens; {cores} cores"]
    notes += [
        f"{name}: {size / 1e6 / rate:.1f} MB/s, {tokens / 1e6 / rate:.2f} million tokens/s"
        for name, rate in rates.items()
    ]
    notes.append(f"ids of every document: {'the same' if same else 'DIFFERENT'}")
    return print_results("Tokenizer", results, hardware("cpu"), notes, json_path)


def _batches(nbytes: int) -> list[DocumentBatch]:
    """Return batches with at least `nbytes` of text."""
    texts = [path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    batches, size = [DocumentBatch()], 0
    while size < nbytes:
        for text in texts:
            if sum(map(len, batches[-1].raw)) >= BATCH_BYTES:
                batches.append(DocumentBatch())
            batches[-1].raw.append(text)
            size += len(text)
            if size >= nbytes:
                break
    return batches


def _cases(folder: Path, batches: list[DocumentBatch], cores: int) -> dict[str, Callable[[], Ids]]:
    from transformers import AutoTokenizer

    encoder = TextEncoder(folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    fast = AutoTokenizer.from_pretrained(folder)

    def ours(workers: int) -> Ids:
        encoded = encode_all(batches, encoder, workers)
        return [ids[:-1] for _, documents in encoded for ids in documents]  # without [EOS]

    def direct(threads: int) -> Ids:
        return [ids for batch in batches for ids in model.encode(_texts(batch), num_threads=threads)]

    def transformers(parallel: bool, encode: Callable[[list[str]], Any]) -> Ids:
        os.environ[_PARALLELISM_VARIABLE] = str(parallel).lower()
        try:
            return [ids for batch in batches for ids in encode(_texts(batch))]
        finally:
            del os.environ[_PARALLELISM_VARIABLE]

    def together(texts: list[str]) -> Any:
        return fast(texts, add_special_tokens=False)["input_ids"]

    def one_by_one(texts: list[str]) -> Any:
        return [fast(text, add_special_tokens=False)["input_ids"] for text in texts]

    return {
        "ours, one core": lambda: ours(1),
        "sentencepiece, one core": lambda: direct(1),
        "transformers, one core": lambda: transformers(False, together),
        "transformers, one by one, one core": lambda: transformers(False, one_by_one),
        "ours, all cores": lambda: ours(cores),
        "sentencepiece, all cores": lambda: direct(cores),
        "transformers, all cores": lambda: transformers(True, together),
    }


def _texts(batch: DocumentBatch) -> list[str]:
    return [raw.decode() for raw in batch.raw]


def _is_equal(ids: Sequence[int], expected: Sequence[int]) -> bool:
    return list(ids) == list(expected)
