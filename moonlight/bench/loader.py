"""`moonlight bench loader`: tokens per second of one core, beside Megatron's GPTDataset on the same files.

If Hugging Face's datasets is installed, it is a peer too: it reads the windows that ours cuts, packed beforehand.

Documents are of realistic lengths, windows of 8,192 tokens, the page cache warm. A batch is what a training step is
given: tokens, labels and loss mask as tensors. Both read windows in random order, as an epoch does; the two take turns.
"""

import importlib.util
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from moonlight.bench.report import BenchResult, hardware, print_results, time_ratio, told_rounds
from moonlight.data.index_cache import IndexCache
from moonlight.data.loader import MixtureDataset, TrainDataset, collate
from moonlight.data.mixture import SourceMixture

LENGTH = 8192
BATCH = 8
BATCHES = 32
"""Batches that a round reads."""
AFTER = 8
"""Batches read by a process that has just opened its data, with an index on disk."""
TOKENS_PER_SECOND, AIMED_PER_SECOND = 50e6, 400e6
SEED = 1
EOS = 163585
WEIGHTS = {"web": 0.6, "code": 0.3, "math": 0.1}
MEDIAN_LENGTH, SPREAD = 600, 1.0
"""Of the documents: log-normal, 990 tokens in the mean."""

Tensors = tuple[torch.Tensor, ...]


class _Tokenizer:
    """What GPTDataset asks of one."""

    vocab_size, eod, pad = 163840, EOS, EOS + 1
    unique_identifiers = "bench"


def bench_loader(rounds: int, tokens: int, json_path: Path | None = None) -> bool:
    """Measure on `tokens` tokens per source, print the table, and return whether every gate and bar has passed."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(place)
        for index, name in enumerate(WEIGHTS):
            _make_source(folder / name, tokens, index)
        right = _is_right(folder / "web")
        ours, peer = _open(folder / "web"), _open_peer(folder / "web")
        mixed, blended = _open_mixture(folder), _open_blended(folder, BATCH * BATCHES * (rounds + 1))
        calls: dict[str, tuple[Callable[[int], Tensors], Callable[[int], Tensors]]] = {
            "windows": (lambda at: _read(ours, at), lambda at: _read_peer(peer, at)),
            "resume": (
                lambda at: _read(_open(folder / "web"), at, AFTER),
                lambda at: _read_again(folder / "web", at),
            ),
            "mix": (lambda at: _read(mixed, at), lambda at: _read_peer(blended, at)),
        }
        if importlib.util.find_spec("datasets"):
            packed, numbers = _open_datasets(folder / "datasets", ours)
            calls["datasets"] = calls["windows"][0], lambda at: _read_datasets(packed, numbers, at)
            right = right and all(map(torch.equal, *(call(0) for call in calls["datasets"])))
        cases: dict[str, tuple[list[float], list[float]]] = {case: ([], []) for case in calls}
        for start in (BATCH * BATCHES * number for number in told_rounds(rounds)):
            for case, pair in calls.items():
                for times, call in zip(cases[case], pair, strict=True):
                    times.append(_cpu_seconds(call, start % len(peer)))
    # The first round warms the page cache.
    seconds = {case: (own[1:], theirs[1:]) for case, (own, theirs) in cases.items()}
    rates = [BATCH * BATCHES * LENGTH / second for second in seconds["windows"][0]]
    peer_rate = BATCH * BATCHES * LENGTH / statistics.median(seconds["windows"][1])
    figures = [
        _rate(rates, right),
        time_ratio(f"{BATCHES} batches, GPTDataset", *_milliseconds(seconds["windows"]), 1.0, right),
        time_ratio(f"resume, {AFTER} batches, GPTDataset", *_milliseconds(seconds["resume"]), 1.0, right),
        time_ratio(f"mixture, {BATCHES} batches, BlendedDataset", *_milliseconds(seconds["mix"]), 1.0, right),
    ]
    notes = [
        f"one core; batches of {BATCH} windows of {LENGTH:,} tokens; CPU time; {tokens / 1e6:.0f}M tokens per source",
        f"in the place of a peer of tokens/s: the bar; GPTDataset reads {peer_rate / 1e6:.0f}M tokens per second",
        "BlendedDataset: of three GPTDatasets, built for just the samples read",
        f"windows against documents joined one by one: {'the same tokens' if right else 'DIFFERENT'}",
    ]
    if "datasets" in seconds:
        figures.append(time_ratio(f"{BATCHES} batches, datasets", *_milliseconds(seconds["datasets"]), 1.0, right))
    else:
        notes.append("datasets: skipped (python -m pip install datasets)")
    return print_results("Loader", figures, hardware("cpu"), notes, json_path)


def _rate(rates: list[float], right: bool) -> BenchResult:
    """Tokens per second of ours in every round, beside the bar."""
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
        right and ratio >= 1,
        ours_rounds=tuple(rate / 1e6 for rate in rates),
        ratio_rounds=ratios,
        aim=AIMED_PER_SECOND / TOKENS_PER_SECOND,
        own_limit=True,
    )


def _make_source(folder: Path, tokens: int, seed: int) -> None:
    folder.mkdir()
    generator = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(str(folder / "train.bin"), np.int32)
    done = 0
    while done < tokens:
        length = int(np.clip(generator.lognormal(np.log(MEDIAN_LENGTH), SPREAD), 16, 100_000))
        document = generator.integers(0, EOS, size=length, dtype=np.int32)
        document[-1] = EOS
        builder.add_document(torch.from_numpy(document), [length])
        done += length
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
    """Every window of the first epoch as a row, mapped from disk, and the row that each sample is."""
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


def _read_datasets(dataset: Any, numbers: np.ndarray, first: int, batches: int = BATCHES) -> Tensors:
    for start in range(first, first + BATCH * batches, BATCH):
        rows = dataset[numbers[np.arange(start, start + BATCH) % len(numbers)]]["input_ids"]
        mask = torch.ones(BATCH, LENGTH)
        batch = rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), mask
    return batch


def _read(samples: TrainDataset | MixtureDataset, first: int, batches: int = BATCHES) -> Tensors:
    for start in range(first, first + BATCH * batches, BATCH):
        batch = collate([samples[number] for number in range(start, start + BATCH)])
    return batch


def _read_peer(dataset: Any, first: int, batches: int = BATCHES) -> Tensors:
    for start in range(first, first + BATCH * batches, BATCH):
        samples = [dataset[number % len(dataset)] for number in range(start, start + BATCH)]
        batch = tuple(torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels", "loss_mask"))
    return batch


def _read_again(folder: Path, first: int) -> Tensors:
    """The first batches after a new start, with the index that the start before left behind."""
    return _read_peer(_open_peer(folder), first, AFTER)


def _is_right(folder: Path) -> bool:
    """Whether windows of an epoch hold the tokens of its documents, joined one by one."""
    samples = _open(folder)
    documents, _, windows = samples._order(0)
    joined = np.concatenate([samples.stream.dataset[int(document)] for document in documents])
    return all(
        np.array_equal(samples[number][0], joined[LENGTH * windows[number] :][: LENGTH + 1])
        for number in range(0, samples.samples_per_epoch, 7)
    )


def _milliseconds(seconds: tuple[list[float], list[float]]) -> tuple[list[float], list[float]]:
    own, theirs = ([1e3 * second for second in times] for times in seconds)
    return own, theirs


def _cpu_seconds(call: Callable[[int], object], first: int) -> float:
    start = time.process_time()
    call(first)
    return time.process_time() - start
