"""`moonlight bench loader`: tokens per second of one core, compared with Megatron's GPTDataset on the same files.

If Hugging Face's datasets is installed, it is another peer. It reads the windows of our loader, packed in advance.

Documents have realistic lengths, windows have 8,192 tokens, and the page cache is warm. A batch consists of a training
step's tensors: tokens, labels and loss mask. Both loaders read windows in random order, as in an epoch, and take turns.
"""

import importlib.util
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from moonlight.bench.report import BenchResult, cpu_seconds, hardware, iter_rounds, print_results, time_ratio
from moonlight.data.index_cache import IndexCache
from moonlight.data.loader import MixtureDataset, TrainDataset, collate
from moonlight.data.mixture import SourceMixture

LENGTH = 8192
BATCH = 8
BATCHES = 32
"""Batches of a round."""
RESUME_BATCHES = 8
"""Batches of a round in the resume case, which first opens the data with an index on disk."""
TOKENS_PER_SECOND, TOKENS_PER_SECOND_AIM = 50e6, 400e6
SEED = 1
EOS = 163585
WEIGHTS = {"web": 0.6, "code": 0.3, "math": 0.1}
MEDIAN_LENGTH, LENGTH_SIGMA = 600, 1.0
"""Log-normal document lengths in tokens, with a mean of 990."""

Tensors = tuple[torch.Tensor, ...]


class _Tokenizer:
    """The attributes of a tokenizer that GPTDataset reads."""

    vocab_size, eod, pad = 163840, EOS, EOS + 1
    unique_identifiers = "bench"


def bench_loader(rounds: int, tokens: int, json_path: Path | None = None) -> bool:
    """Run the benchmark on `tokens` tokens per source, print its table, and return whether every result passed."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as temporary_folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(temporary_folder)
        for index, name in enumerate(WEIGHTS):
            _make_source(folder / name, tokens, index)
        is_correct = _is_correct(folder / "web")
        ours, peer = _open(folder / "web"), _open_peer(folder / "web")
        mixed, blended = _open_mixture(folder), _open_blended(folder, BATCH * BATCHES * (rounds + 1))
        calls: dict[str, tuple[Callable[[int], Tensors], Callable[[int], Tensors]]] = {
            "windows": (lambda start: _read(ours, start), lambda start: _read_peer(peer, start)),
            "resume": (
                lambda start: _read(_open(folder / "web"), start, RESUME_BATCHES),
                lambda start: _read_peer(_open_peer(folder / "web"), start, RESUME_BATCHES),
            ),
            "mix": (lambda start: _read(mixed, start), lambda start: _read_peer(blended, start)),
        }
        if importlib.util.find_spec("datasets"):
            packed, row_indices = _open_datasets(folder / "datasets", ours)
            calls["datasets"] = calls["windows"][0], lambda start: _read_datasets(packed, row_indices, start)
            is_correct = is_correct and all(map(torch.equal, *(call(0) for call in calls["datasets"])))
        cases: dict[str, tuple[list[float], list[float]]] = {case: ([], []) for case in calls}
        for start in (BATCH * BATCHES * round_index for round_index in iter_rounds(rounds)):
            for case, pair in calls.items():
                for times, call in zip(cases[case], pair, strict=True):
                    times.append(cpu_seconds(partial(call, start % len(peer))))
    # The first round warms the page cache.
    seconds = {case: [times[1:] for times in pair] for case, pair in cases.items()}

    def ratio(title: str, case: str) -> BenchResult:
        ours, peer = ([1e3 * second for second in times] for times in seconds[case])
        return time_ratio(title, ours, peer, 1.0, is_correct)

    rates = [BATCH * BATCHES * LENGTH / second for second in seconds["windows"][0]]
    peer_rate = BATCH * BATCHES * LENGTH / statistics.median(seconds["windows"][1])
    results = [
        _rate_result(rates, is_correct),
        ratio(f"{BATCHES} batches, GPTDataset", "windows"),
        ratio(f"resume, {RESUME_BATCHES} batches, GPTDataset", "resume"),
        ratio(f"mixture, {BATCHES} batches, BlendedDataset", "mix"),
    ]
    notes = [
        f"one core; batches of {BATCH} windows of {LENGTH:,} tokens; CPU time; {tokens / 1e6:.0f}M tokens per source",
        f"tokens/s is compared with the bar; GPTDataset reads {peer_rate / 1e6:.0f}M tokens per second",
        "BlendedDataset: three GPTDatasets, built for the samples of the benchmark only",
        f"windows compared with documents joined one by one: {'the same tokens' if is_correct else 'DIFFERENT'}",
    ]
    if "datasets" in seconds:
        results.append(ratio(f"{BATCHES} batches, datasets", "datasets"))
    else:
        notes.append("datasets: skipped (python -m pip install datasets)")
    return print_results("Loader", results, hardware("cpu"), notes, json_path)


def _rate_result(rates: list[float], is_correct: bool) -> BenchResult:
    """Return the result of our tokens per second in each round, compared with the bar."""
    ratios = tuple(rate / TOKENS_PER_SECOND for rate in rates)
    ratio = statistics.median(ratios)
    return BenchResult(
        "tokens/s",
        "M",
        statistics.median(rates) / 1e6,
        TOKENS_PER_SECOND / 1e6,
        ratio,
        f"{min(ratios):.2f}..{max(ratios):.2f}",
        ">= 1",
        is_correct and ratio >= 1,
        ours_rounds=tuple(rate / 1e6 for rate in rates),
        ratio_rounds=ratios,
        aim=TOKENS_PER_SECOND_AIM / TOKENS_PER_SECOND,
        own_limit=True,
    )


def _make_source(folder: Path, tokens: int, seed: int) -> None:
    folder.mkdir()
    generator = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(str(folder / "train.bin"), np.int32)
    num_tokens = 0
    while num_tokens < tokens:
        length = int(np.clip(generator.lognormal(np.log(MEDIAN_LENGTH), LENGTH_SIGMA), 16, 100_000))
        document = generator.integers(0, EOS, size=length, dtype=np.int32)
        document[-1] = EOS
        builder.add_document(torch.from_numpy(document), [length])
        num_tokens += length
    builder.finalize(str(folder / "train.idx"))


def _open(folder: Path) -> TrainDataset:
    return TrainDataset(folder, LENGTH, SEED, IndexCache(folder / "ours", {"seed": SEED}))


def _open_mixture(folder: Path) -> MixtureDataset:
    return MixtureDataset(
        SourceMixture(list(WEIGHTS), [(0, WEIGHTS)], SEED), {name: _open(folder / name) for name in WEIGHTS}
    )


def _open_peer(folder: Path, num_samples: int | None = None) -> Any:
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=LENGTH,
        blend=([str(folder)], None),
        split="1",
        tokenizer=_Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(str(folder / "train"))
    documents = np.arange(len(indexed.sequence_lengths), dtype=np.int32)
    return GPTDataset(indexed, str(folder), documents, num_samples, Split.train, config)


def _open_blended(folder: Path, size: int) -> Any:
    parts = [_open_peer(folder / name, int(size * weight * 1.01) + 2) for name, weight in WEIGHTS.items()]
    return BlendedDataset(parts, list(WEIGHTS.values()), size, parts[0].config)


def _open_datasets(folder: Path, ours: TrainDataset) -> tuple[Any, np.ndarray]:
    """Return a memory-mapped dataset with one row per window of the first epoch, and the row index of each sample."""
    import datasets
    import pyarrow

    documents, ends, windows = ours._order(0)
    rows = np.empty((len(windows), LENGTH + 1), dtype=np.int32)
    for index, row in enumerate(rows):
        row[:] = ours.stream.read(documents, ends, index * LENGTH, (index + 1) * LENGTH + 1)
    bounds = np.arange(0, rows.size + 1, LENGTH + 1, dtype=np.int32)
    table = pyarrow.table({"input_ids": pyarrow.ListArray.from_arrays(bounds, rows.reshape(-1))})
    datasets.disable_progress_bars()
    datasets.Dataset(table).save_to_disk(folder)
    return datasets.load_from_disk(folder).with_format("torch"), windows


def _read_datasets(dataset: Any, row_indices: np.ndarray, first: int, batches: int = BATCHES) -> Tensors:
    for start in range(first, first + BATCH * batches, BATCH):
        rows = dataset[row_indices[np.arange(start, start + BATCH) % len(row_indices)]]["input_ids"]
        batch = rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.ones(BATCH, LENGTH)
    return batch


def _read(samples: TrainDataset | MixtureDataset, first: int, batches: int = BATCHES) -> Tensors:
    for start in range(first, first + BATCH * batches, BATCH):
        batch = collate([samples[index] for index in range(start, start + BATCH)])
    return batch


def _read_peer(dataset: Any, first: int, batches: int = BATCHES) -> Tensors:
    for start in range(first, first + BATCH * batches, BATCH):
        samples = [dataset[index % len(dataset)] for index in range(start, start + BATCH)]
        batch = tuple(torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels", "loss_mask"))
    return batch


def _is_correct(folder: Path) -> bool:
    """Return whether the windows of an epoch equal the tokens of its documents, joined one by one."""
    samples = _open(folder)
    documents, _, windows = samples._order(0)
    joined = np.concatenate([samples.stream.dataset[int(document)] for document in documents])
    return all(
        np.array_equal(samples[index][0], joined[LENGTH * windows[index] :][: LENGTH + 1])
        for index in range(0, samples.samples_per_epoch, 7)
    )
