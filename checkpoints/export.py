"""Export of a checkpoint as a Hugging Face folder, tensor by tensor in one process."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from checkpoints.card import model_card
from checkpoints.hf_config import CONFIG_FILE, generation_config, hf_config
from checkpoints.hf_folder import GENERATION_FILE, INDEX_FILE, read_json_strict
from checkpoints.licenses import check_license
from checkpoints.reader import Checkpoint, open_checkpoint
from checkpoints.shards import ShardEntry, plan_shards, write_shard
from checkpoints.writer import BESIDE_WEIGHTS_BYTES
from moonlight.config.run import RunConfig
from moonlight.data.chat_template import TEMPLATE_FILE, set_chat_mode
from moonlight.data.manifest import load_manifest
from moonlight.data.tokenizer import Tokenizer
from moonlight.data.tokenizer_files import copy_tokenizer
from moonlight.dist_checkpoint import hf_mapping
from moonlight.dist_checkpoint.state import STATE_FILE, read_state, resolve_checkpoint, stored_config
from moonlight.errors import UserError
from moonlight.files import (
    atomic_folder,
    atomic_write_text,
    check_output,
    check_space,
    check_sums,
    output_conflict_error,
    sha256_checksum,
    write_json,
    write_sums,
)
from moonlight.progress import byte_progress
from moonlight.train.metrics import CURVE_FILE, draw_loss_curve, read_metrics

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
END_OF_MESSAGE = "<|im_end|>"
EXPORT_FILE = "export.json"
"""Source and options of the export, which identify it, and facts for evaluation."""
CARD_FILE = "README.md"
EVALUATION_FILE = "evaluation.md"
"""File in a run folder with results for the model card, as Markdown."""


def export(
    source: Path,
    out: Path,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: Path | None = None,
    revision_step: int | None = None,
    chat: bool = False,
    untie: bool = False,
    license: str | None = None,
    repo: str | None = None,
) -> bool:
    """Write the newest checkpoint of a run, or a given checkpoint, to the folder `out`.

    Args:
        dtype: float32 writes the master weights bit-identically; bfloat16 rounds them. Router biases stay float32.
        max_shard_bytes: maximum size of a safetensors file; a single larger tensor gets its own file.
        tokenizer: folder of the tokenizer; None takes the one in the checkpoint, or the one in its recipe.
        revision_step: export the checkpoint after this step of a run, to be released as the revision `step-N`.
        chat: for an instruction-tuned model: generation ends at [EOS] and at <|im_end|>, or at the token that ended the
            assistant's turns in tuning. Text that spells out a chat marker is encoded as that marker, which chat
            servers need (`moonlight.data.chat_template`). Without `tokenizer`, the tuning data gives the template.
        untie: also write tied embeddings as the head; vLLM 0.32 serves a tied model incorrectly, without an error.
        license: license of the model, for its card; for example apache-2.0.
        repo: name on the Hub, for the examples in the card.

    Returns:
        False if `out` already is this export.

    Raises:
        UserError: no usable checkpoint or tokenizer, too little disk space, or `out` exists with different content.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}: accepted are {', '.join(DTYPES)}")
    if license:
        check_license(license)
    check_output(out, EXPORT_FILE)
    checkpoint = open_checkpoint(source, revision_step)
    tuning_data = _tuning_data(checkpoint.config) if chat and tokenizer is None else None
    tokenizer = tokenizer or checkpoint.tokenizer
    ids = None if tokenizer is None else Tokenizer.load(tokenizer)
    if chat and tokenizer is None:
        raise UserError(f"{source} has no tokenizer, which --chat needs: give one with --tokenizer")
    if ids and checkpoint.tokenizer_sha256 and ids.sha256 != checkpoint.tokenizer_sha256:
        raise UserError(
            f"tokenizer {tokenizer} has checksum {ids.sha256[:12]}, the model was trained with "
            f"{checkpoint.tokenizer_sha256[:12]}: give that tokenizer with --tokenizer"
        )
    made_from = {
        "state_sha256": sha256_checksum(checkpoint.folder / STATE_FILE),
        "step": checkpoint.state.step,
        "revision_step": revision_step,
        "tokenizer_sha256": ids.sha256 if ids else None,
        "dtype": dtype,
        "max_shard_bytes": max_shard_bytes,
        "chat": chat,
        "untie": untie,
        "license": license,
        "repo": repo,
    }
    if out.exists():
        _check_same(out, made_from)
        return False
    end_ids = _end_ids(tokenizer, ids, tuning_data, chat) if tokenizer and ids else []
    model_config = replace(
        checkpoint.model_config, tie_word_embeddings=checkpoint.model_config.tie_word_embeddings and not untie
    )
    shards = plan_shards(hf_mapping.tensor_mappings(model_config), DTYPES[dtype], max_shard_bytes)
    check_space(out, sum(entry.nbytes for shard in shards for entry in shard) + BESIDE_WEIGHTS_BYTES)
    with atomic_folder(out) as part:
        sums = _write_weights(checkpoint, part, shards)
        if tokenizer:
            copy_tokenizer(tokenizer, part)
            if chat:
                set_chat_mode(part)
                if tuning_data:
                    shutil.copyfile(tuning_data / TEMPLATE_FILE, part / TEMPLATE_FILE)
        bos_id, eos_id = ids.bos_id if ids else None, end_ids[0] if end_ids else None
        write_json(part / CONFIG_FILE, hf_config(model_config, dtype=dtype, bos_id=bos_id, eos_id=eos_id))
        write_json(part / GENERATION_FILE, generation_config(checkpoint.model_config, bos_id=bos_id, eos_ids=end_ids))
        _write_card(checkpoint, out, part, dtype, chat, license, repo)
        facts = {
            "consumed_tokens": checkpoint.state.consumed_tokens,
            "sequence_length": checkpoint.config.data.sequence_length if checkpoint.config else None,
        }
        write_json(part / EXPORT_FILE, {"made_from": made_from, **facts})
        write_sums(part, sums)
    return True


def _tuning_data(config: RunConfig | None) -> Path | None:
    """Return the folder of the run's tuning data, which has the chat template; None if the run was not tuned.

    Raises:
        UserError: the folder no longer exists.
    """
    if config is None or not config.data.conversations:
        return None
    folder = Path(next(iter(config.data.mixture.values())).path)
    try:
        load_manifest(folder)
    except UserError as error:
        raise UserError(
            f"the chat template of the model is in its tuning data ({error}); or give a tokenizer with the same "
            "template with --tokenizer"
        ) from None
    return folder


def _end_ids(tokenizer: Path, ids: Tokenizer, tuning_data: Path | None, chat: bool) -> list[int]:
    """Return the ids that end generation: for a chat the end of a message, then [EOS].

    Otherwise return those in the generation_config.json of an imported model, or [EOS].

    Raises:
        UserError: the tokenizer of a chat model has no token that ends a message.
    """
    if chat:
        end = load_manifest(tuning_data)["chat"]["end_token"] if tuning_data else END_OF_MESSAGE
        end_id = ids.token_id(end)
        if end_id is None:
            raise UserError(f"tokenizer {tokenizer} has no {end}, which ends a message: leave --chat out")
        return list(dict.fromkeys([end_id, ids.eos_id]))
    generation = tokenizer / GENERATION_FILE
    eos = read_json_strict(generation).get("eos_token_id") if generation.is_file() else None
    end_ids = [eos_id for eos_id in (eos if isinstance(eos, list) else [eos]) if type(eos_id) is int]
    return end_ids or [ids.eos_id]


def _write_card(
    checkpoint: Checkpoint, out: Path, part: Path, dtype: str, chat: bool, license: str | None, repo: str | None
) -> None:
    """Write README.md and the loss curve, from the records in the run folder."""
    folder, config = checkpoint.run_folder, checkpoint.config
    metrics = read_metrics(folder) if folder else []
    metrics = [entry for entry in metrics if entry["step"] <= checkpoint.state.step]
    if config and metrics:
        draw_loss_curve(metrics, part / CURVE_FILE, f"{config.name}: {config.optimizer.name}")
    evaluation = folder / EVALUATION_FILE if folder else None
    card = model_card(
        model_config=checkpoint.model_config,
        name=repo or (config.name if config else out.name),
        step=checkpoint.state.step,
        dtype=dtype,
        license=license,
        chat=chat,
        config=config,
        consumed_tokens=checkpoint.state.consumed_tokens,
        metrics=metrics,
        manifests=_manifests(config),
        imported_from=_first_weights(checkpoint.origin, config),
        evaluation=evaluation.read_text("utf-8") if evaluation and evaluation.is_file() else None,
        curve=bool(metrics),
        averaged_steps=checkpoint.origin.get("averaged_steps", ()),
    )
    atomic_write_text(part / CARD_FILE, card)


def _first_weights(origin: dict[str, Any], config: RunConfig | None) -> str | None:
    """Return the source of the initial weights: name of an imported model, or a path; None if they were random."""
    initial = config.train.initial_checkpoint if config else ""
    if not initial:
        return origin.get("imported_from")
    try:
        content = read_state(resolve_checkpoint(Path(initial)), check_files=False)
        _, previous_config = stored_config(content)
    except UserError:  # the checkpoint was moved
        return str(Path(initial).absolute())
    # The absolute path, because `runs/base` looks like a name on the Hub.
    return _first_weights(content.get("origin", {}), previous_config) or str(Path(initial).absolute())


def _manifests(config: RunConfig | None) -> dict[str, dict[str, Any]] | None:
    """Return the manifests of the training data, by source; None if a manifest no longer exists."""
    try:
        return (
            {name: load_manifest(Path(source.path)) for name, source in config.data.mixture.items()} if config else None
        )
    except UserError:
        return None


def _check_same(out: Path, made_from: dict[str, Any]) -> None:
    """Raise UserError unless `out` is a valid export with the same source and options."""
    try:
        content = json.loads((out / EXPORT_FILE).read_text(encoding="utf-8"))
        same = content["made_from"] == made_from
        check_sums(out)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise output_conflict_error(out)


def _write_weights(checkpoint: Checkpoint, folder: Path, shards: list[list[ShardEntry]]) -> dict[str, str]:
    """Write the safetensors shards and their index. Return the SHA-256 of each shard, by name."""
    weight_map: dict[str, str] = {}
    sums: dict[str, str] = {}
    total = sum(entry.nbytes for shard in shards for entry in shard)
    written = 0
    with byte_progress("exporting", total) as advance:

        def report_written(nbytes: int) -> None:
            nonlocal written
            written += nbytes
            advance(written)

        for index, shard in enumerate(shards, start=1):
            name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
            sums[name] = write_shard(
                folder / name,
                shard,
                lambda entry: checkpoint.read_hf_tensor(entry.mapping, entry.hf_tensor),
                report_written,
            )
            weight_map |= {entry.hf_tensor.name: name for entry in shard}
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return sums
