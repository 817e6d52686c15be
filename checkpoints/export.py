"""A checkpoint as a Hugging Face folder, in one process, tensor by tensor."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from checkpoints.hf_config import generation_config, hf_config
from checkpoints.reader import Checkpoint, open_checkpoint
from checkpoints.shards import Entry, plan_shards, write_shard
from moonlight import mapping
from moonlight.data.tokenizer import Tokenizer, set_chat_mode
from moonlight.errors import UserError
from moonlight.files import check_space, check_sums, sha256_of, whole_folder, write_json, write_sums
from moonlight.progress import byte_progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
END_OF_MESSAGE = "<|im_end|>"
EXPORT_FILE = "export.json"
"""What the folder was made from: the proof that an export is the same."""
BESIDE_WEIGHTS_BYTES = 100 * 10**6
"""Room for tokenizer, card and picture."""


def export(
    source: Path,
    out: Path,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: Path | None = None,
    revision_step: int | None = None,
    chat: bool = False,
    license: str | None = None,
) -> bool:
    """Write the newest checkpoint of a run, or a given checkpoint, to the folder `out`.

    Args:
        dtype: float32 writes the master weights bit for bit; bfloat16 rounds them. Router biases stay float32.
        max_shard_bytes: most bytes of one safetensors file, unless a single tensor has more.
        tokenizer: folder of the tokenizer; None takes the checkpoint's own or the one that its recipe names.
        revision_step: the checkpoint after this step of a run, to be released as the revision `step-N`.
        chat: for an instruction-tuned model: generation ends at <|im_end|> (and [EOS]), and text that spells a chat
            marker out is encoded as that marker, which chat servers need (`moonlight.data.tokenizer`).
        license: of the model, for its card; for example apache-2.0.

    Returns:
        False if `out` already was this very export.

    Raises:
        UserError: no usable checkpoint or tokenizer, no room, or `out` exists with something else in it.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}: accepted are {', '.join(DTYPES)}")
    checkpoint = open_checkpoint(source, revision_step)
    tokenizer = tokenizer or checkpoint.tokenizer
    ids = None if tokenizer is None else Tokenizer.load(tokenizer)
    if ids and checkpoint.tokenizer_sha256 and ids.sha256 != checkpoint.tokenizer_sha256:
        raise UserError(
            f"tokenizer {tokenizer} has checksum {ids.sha256[:12]}, the model was trained with "
            f"{checkpoint.tokenizer_sha256[:12]}: give that tokenizer with --tokenizer"
        )
    made_from = {
        "state_sha256": sha256_of(checkpoint.folder / "state.json"),
        "step": checkpoint.state.step,
        "revision_step": revision_step,
        "tokenizer_sha256": ids.sha256 if ids else None,
        "dtype": dtype,
        "max_shard_bytes": max_shard_bytes,
        "chat": chat,
        "license": license,
    }
    if out.exists():
        _check_same(out, made_from)
        return False
    shards = plan_shards(mapping.table(checkpoint.model), DTYPES[dtype], max_shard_bytes)
    check_space(out, sum(entry.nbytes for shard in shards for entry in shard) + BESIDE_WEIGHTS_BYTES)
    with whole_folder(out) as part:
        sums = _write_weights(checkpoint, part, shards)
        bos_id, eos_ids = _write_tokenizer(part, tokenizer, ids, chat)
        eos_id = eos_ids[0] if eos_ids else None
        config = hf_config(checkpoint.model, dtype=dtype, bos_id=bos_id, eos_id=eos_id)
        write_json(part / "config.json", config)
        write_json(part / "generation_config.json", generation_config(checkpoint.model, bos_id=bos_id, eos_ids=eos_ids))
        write_json(part / EXPORT_FILE, {"made_from": made_from})
        write_sums(part, sums)
    return True


def _write_tokenizer(
    out: Path, tokenizer: Path | None, ids: Tokenizer | None, chat: bool
) -> tuple[int | None, list[int]]:
    """Copy the tokenizer; the id that begins a text and those that end one."""
    if tokenizer is None or ids is None:
        return None, []
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, out / name)
    if chat:
        set_chat_mode(out)
        return ids.bos_id, [_end_of_message_id(tokenizer), ids.eos_id]
    return ids.bos_id, [ids.eos_id]


def _end_of_message_id(tokenizer: Path) -> int:
    """The id that ends a chat message.

    Raises:
        UserError: the tokenizer has none.
    """
    import tokenizers

    path = tokenizer / "tokenizer.json"
    try:
        end_id = tokenizers.Tokenizer.from_file(str(path)).token_to_id(END_OF_MESSAGE)
    except Exception as error:  # the library raises nothing more precise
        raise UserError(f"{path} cannot be read as a tokenizer ({error}): --chat needs one") from None
    if end_id is None:
        raise UserError(f"tokenizer {tokenizer} has no {END_OF_MESSAGE}, which ends a chat message: leave --chat out")
    return end_id


def _check_same(out: Path, made_from: dict[str, Any]) -> None:
    try:
        content = json.loads((out / EXPORT_FILE).read_text(encoding="utf-8"))
        same = content["made_from"] == made_from
        check_sums(out)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(f"{out} exists with something else in it: choose another folder, or remove it")


def _write_weights(checkpoint: Checkpoint, folder: Path, shards: list[list[Entry]]) -> dict[str, str]:
    """Safetensors shards and the index that names the shard of every tensor. Returns the SHA-256 of the shards."""
    shard_of: dict[str, str] = {}
    sums: dict[str, str] = {}
    total = sum(entry.nbytes for shard in shards for entry in shard)
    written = 0
    with byte_progress("exporting", total) as advance:

        def done(nbytes: int) -> None:
            nonlocal written
            written += nbytes
            advance(written)

        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            sums[name] = write_shard(folder / name, shard, lambda entry: checkpoint.part(entry.row, entry.part), done)
            shard_of |= {entry.part.name: name for entry in shard}
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": shard_of},
    )
    return sums
