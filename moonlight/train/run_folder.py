"""The folder of a run: paths, the checks before a run starts, and the summary after it."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moonlight.config.load import load_recipe
from moonlight.config.run import RunConfig
from moonlight.config.timeline import RunSchedule
from moonlight.data.manifest import check_tokenizer, held_out_counts, is_chat, load_manifest
from moonlight.data.mixture import build_mixture, samples_per_epoch
from moonlight.data.tokenizer import Tokenizer
from moonlight.dist_checkpoint.state import (
    CorruptCheckpointError,
    check_model,
    check_optimizer,
    complete_checkpoints,
    read_latest,
    read_state,
    resolve_checkpoint,
)
from moonlight.errors import UserError
from moonlight.train.metrics import CURVE_FILE, draw_loss_curve, read_metrics

CONFIG_FILE = "config.yaml"

MUTABLE_SETTINGS = frozenset(
    {
        "runs_folder",
        "data.cache_folder",
        "parallel",
        "monitor",
        "train.micro_batch_size",
        "train.recompute_modules",
        "train.threads_per_process",
        "train.validate_every_steps",
        "train.validation_sequences",
        "train.save_every_steps",
        "train.keep_checkpoints",
        "train.save_every_minutes",
        "train.grace_seconds",
        "train.hang_timeout_seconds",
        "train.max_restarts",
        "train.max_skipped_steps_in_a_row",
        "train.max_rollbacks_in_a_row",
        "train.spike_policy",
        "train.spike_threshold",
        "train.spike_window",
        "train.rollback_steps",
        "train.keep_every_steps",
        "train.async_save",
        "train.stop_at_step",
    }
)
"""Settings and sections that may change when a run is resumed."""


def run_path(config: RunConfig) -> Path:
    """Return the folder of the run."""
    return Path(config.runs_folder) / config.name


def cache_folder(config: RunConfig) -> Path:
    """Return the folder in which this host caches the epoch orders of the run."""
    return Path(config.data.cache_folder) / config.name if config.data.cache_folder else run_path(config) / ".order"


def check_data(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return the manifest of each source by name, after checking that data, tokenizer and model match.

    Raises:
        UserError: a file is missing, the three do not match, or the run needs more epochs than a source allows.
    """
    manifests = {name: load_manifest(Path(source.path)) for name, source in config.data.mixture.items()}
    tokenizer = Tokenizer.load(Path(config.data.tokenizer))
    for name, source in config.data.mixture.items():
        _check_source(config, source.path, manifests[name], tokenizer)
    if tokenizer.num_text_ids > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size is {config.model.vocab_size}: the tokenizer {config.data.tokenizer} can give text any "
            f"of {tokenizer.num_text_ids} ids, which need at least as many rows"
        )
    _check_epochs(config, manifests)
    return manifests


def _check_source(config: RunConfig, folder: str, manifest: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Raise UserError unless one data folder fits the config."""
    if is_chat(manifest) != config.data.conversations:
        kind, command = ("conversations", "sft") if is_chat(manifest) else ("text", "pretrain")
        raise UserError(
            f"data {folder} holds {kind}: data.conversations must be {str(is_chat(manifest)).lower()}, "
            f"for `moonlight {command}`"
        )
    check_tokenizer(Path(folder), manifest, tokenizer)
    # Special ids beyond the rows are harmless if they do not occur: some tokenizers reserve more ids than a model has.
    largest = max(split["largest_id"] for split in manifest["splits"].values())
    if largest >= config.model.vocab_size:
        raise UserError(
            f"model.vocab_size is {config.model.vocab_size}: id {largest} occurs in the data {folder}, which needs "
            f"at least {largest + 1} rows"
        )
    if "validation" not in manifest["splits"]:
        raise UserError(f"data {folder} has no held-out documents: prepare it with --validation-share above 0")
    length = config.data.sequence_length
    if config.data.conversations and manifest["chat"]["sequence_length"] != length:
        raise UserError(
            f"data.sequence_length is {length}: {folder} was packed for {manifest['chat']['sequence_length']}; "
            "give that, or prepare the conversations again"
        )
    if samples_in_an_epoch(manifest, length) < 1:
        tokens = manifest["splits"]["train"]["tokens"]
        raise UserError(
            f"data {folder} has {tokens} training tokens: too few for one sequence of data.sequence_length {length} "
            "and the token after it"
        )


def _check_epochs(config: RunConfig, manifests: Mapping[str, dict[str, Any]]) -> None:
    """Raise UserError if the run would repeat a source more often than its `max_epochs`."""
    run_schedule = RunSchedule(config)
    counts = build_mixture(config).counts(run_schedule.first_sequence + run_schedule.num_sequences)
    for name, source in config.data.mixture.items():
        epochs = counts[name] / samples_in_an_epoch(manifests[name], config.data.sequence_length)
        if 0 < source.max_epochs < epochs:
            raise UserError(
                f"source {name} needs {epochs:.4g} epochs up to the end of this run, data.sources.{name}."
                f"max_epochs is {source.max_epochs:g}: give it less weight, more text, or more epochs"
            )


def samples_in_an_epoch(manifest: dict[str, Any], sequence_length: int) -> int:
    """Return the number of sequences in one epoch of a data folder."""
    split = manifest["splits"]["train"]
    return split["windows"] if is_chat(manifest) else samples_per_epoch(split["tokens"], sequence_length)


def resolve_train_steps(config: RunConfig) -> RunConfig:
    """Return the config with train.train_steps computed from train.epochs and the data; unchanged if epochs is 0.

    Raises:
        UserError: the data does not exist, train.train_steps contradicts train.epochs, or the warmup is longer.
    """
    train_config = config.train
    if train_config.epochs == 0:
        return config
    manifest = load_manifest(Path(config.data.path))
    samples = samples_in_an_epoch(manifest, config.data.sequence_length)
    steps = max(1, math.ceil(train_config.epochs * samples / train_config.global_batch_size))
    if train_config.train_steps not in (0, steps):
        raise UserError(
            f"train.train_steps is {train_config.train_steps}: train.epochs {train_config.epochs:g} are {steps} "
            f"steps of {config.data.path}; set one of them to 0"
        )
    if config.schedule and steps < config.schedule.warmup_steps:
        raise UserError(
            f"train.epochs {train_config.epochs:g} are {steps} steps of {config.data.path}, fewer than "
            f"schedule.warmup_steps ({config.schedule.warmup_steps}): raise the one or lower the other"
        )
    return dataclasses.replace(config, train=dataclasses.replace(train_config, train_steps=steps))


def check_initial_checkpoint(config: RunConfig) -> Path | None:
    """Check that a new run can start from `train.initial_checkpoint`, without reading the checkpoint's tensors.

    Returns:
        The checkpoint to start from; None if the recipe names none, or the run already has a checkpoint.

    Raises:
        UserError: the checkpoint does not exist, was saved from a different model, or was trained with a tokenizer
            other than that of the data.
    """
    train_config = config.train
    if train_config.only_stage not in ("", *list(config.stages)[:1]) and not train_config.initial_checkpoint:
        raise UserError(
            f"train.only_stage is {train_config.only_stage!r}, which is not the first stage: set "
            "train.initial_checkpoint to the weights to start from"
        )
    if not train_config.initial_checkpoint or complete_checkpoints(run_path(config)):
        return None
    try:
        folder = resolve_checkpoint(Path(config.train.initial_checkpoint))
    except UserError as error:
        raise UserError(f"train.initial_checkpoint: {error}") from None
    content = read_state(folder, check_files=False)
    check_model(folder, content, config)
    stored, current = content["tokenizer_sha256"], Tokenizer.load(Path(config.data.tokenizer)).sha256
    if stored and stored != current:
        raise UserError(
            f"train.initial_checkpoint {folder} was trained with the tokenizer of checksum {stored[:12]}, "
            f"data.tokenizer {config.data.tokenizer} has {current[:12]}: prepare the data with the tokenizer of the "
            "checkpoint"
        )
    return folder


def check_resumable(folder: Path, config: RunConfig, *, force: bool = False) -> list[str]:
    """Check that `folder` is new, or holds a run that `config` can resume; write nothing.

    Args:
        force: accept a run whose settings differ.

    Returns:
        The settings that differ from those of the run in the folder, except `MUTABLE_SETTINGS`, as text.

    Raises:
        UserError: the folder holds a run with other settings, or other files.
    """
    config_path = folder / CONFIG_FILE
    if config_path.exists():
        try:
            stored = load_recipe(config_path)
        except UserError as error:
            raise UserError(
                f"{folder} cannot be resumed, its {CONFIG_FILE} is corrupt: {error}; choose another name"
            ) from None
        before, now = flatten(dataclasses.asdict(stored)), flatten(dataclasses.asdict(config))
        changed = [
            f"{key} ({before.get(key)!r} there, {now.get(key)!r} now)"
            for key in before | now
            if before.get(key) != now.get(key) and not {key, key.split(".")[0]} & MUTABLE_SETTINGS
        ]
        if changed and not force:
            raise UserError(
                f"{folder} holds a run with other settings: {'; '.join(changed)}; give this one another name with "
                "name=..., resume with the new settings by --force, or remove that folder"
            )
        _, newest = read_latest(folder / "checkpoints")
        if changed and newest is not None:
            with contextlib.suppress(CorruptCheckpointError):  # training warns and resumes from another one
                content = read_state(newest, check_files=False)
                check_model(newest, content, config)
                check_optimizer(newest, content, config)
        return changed
    elif folder.is_dir():
        # Tokenizer and data of the run may be inside the folder.
        data = [source.path for source in config.data.mixture.values()]
        inputs = [Path(path).resolve() for path in (*data, config.data.tokenizer)]
        for entry in sorted(folder.iterdir()):
            if not entry.name.startswith(".") and not any(path.is_relative_to(entry.resolve()) for path in inputs):
                raise UserError(
                    f"{folder} already exists with different content ({entry.name}) and no {CONFIG_FILE}: "
                    "give this one another name with name=..., or remove it"
                )
    elif folder.exists():
        raise UserError(f"{folder} is a file: choose another name for the run, or remove it")
    return []


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def is_finished(config: RunConfig) -> bool:
    """Return True if the newest checkpoint is after the last step and the loss curve exists. Imports no torch."""
    _, newest = read_latest(run_path(config) / "checkpoints")
    if newest is None or not (run_path(config) / CURVE_FILE).exists():
        return False
    try:
        return read_state(newest, check_files=False)["state"]["step"] >= RunSchedule(config).num_steps
    except CorruptCheckpointError:
        return False  # training warns and resumes from another one


def summarize(folder: Path, config: RunConfig, manifests: Mapping[str, dict[str, Any]]) -> None:
    """Draw the loss curve and print the table of results."""
    entries = read_metrics(folder)
    curve = folder / CURVE_FILE
    draw_loss_curve(entries, curve, f"{config.name}: {config.optimizer.name}")
    rows = {
        "steps": f"{entries[-1]['step']} of {RunSchedule(config).num_steps}",
        "tokens": f"{entries[-1]['consumed_tokens']:,}",
        "training loss": f"{entries[-1]['loss/train']:.4f} nats per token",
    }
    sources = list(manifests) if len(manifests) > 1 else []
    for name in sources:
        rows[f"tokens of {name}"] = f"{entries[-1][f'data/tokens/{name}']:,}"
    if validated := [entry for entry in entries if "loss/validation" in entry]:
        count = config.train.validation_sequences
        subset = f", first {count} held-out sequences" if count else ""
        rows["validation loss"] = f"{validated[-1]['loss/validation']:.4f} nats per token{subset}"
        for name in sources:
            rows[f"validation loss of {name}"] = f"{validated[-1][f'loss/validation/{name}']:.4f} nats per token"
    if config.data.conversations and "loss/held_out" in entries[-1]:
        rows["held-out loss"] = f"{entries[-1]['loss/held_out']:.4f} nats per assistant token"
    if "bits_per_byte/held_out" in entries[-1]:
        split = held_out_counts(manifests.values())
        rows["held-out text"] = f"{split['bytes']:,} bytes in {split['documents']} documents, every byte predicted"
        rows["held-out loss"] = f"{entries[-1]['loss/held_out']:.4f} nats per token"
        rows["bits per byte: model"] = f"{entries[-1]['bits_per_byte/held_out']:.3f}"
        for name in ("gzip", "xz"):
            bits = 8 * split[f"{name}_bytes"] / split["compressed_text_bytes"]
            rows[f"bits per byte: {name} -9"] = f"{bits:.3f}"
    seconds = sum(entry["time/step_seconds"] for entry in entries)
    tokens = sum(entry["optim/global_batch_size"] for entry in entries) * config.data.sequence_length
    rows["speed"] = f"{tokens / seconds:,.0f} tokens/s over {seconds:.0f} s of steps"
    rows["loss curve"] = str(curve)
    rows["checkpoint"] = str(folder / "checkpoints")
    table = Table(show_header=False, title="Summary", title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
