"""A checkpoint as a Hugging Face folder, in one process, holding no more than one shard in memory."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import save_file

from checkpoints.hf_config import generation_config, hf_config
from checkpoints.reader import Checkpoint, open_checkpoint
from moonlight import mapping
from moonlight.data.tokenizer import Tokenizer, set_chat_mode
from moonlight.errors import UserError
from moonlight.files import sha256_of, whole_folder, write_json

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
"""What the folder was made from and the checksum of every file: the proof that an export is the same and whole."""


def export(
    source: Path,
    out: Path,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: Path | None = None,
    chat: bool = False,
) -> bool:
    """Write the newest checkpoint of a run, or a given checkpoint, to the folder `out`.

    Args:
        dtype: float32 writes the master weights bit for bit; bfloat16 rounds them. Router biases stay float32.
        max_shard_bytes: most bytes of one safetensors file, unless a single tensor has more.
        tokenizer: folder of the tokenizer; None takes the one that the recipe names.
        chat: for an instruction-tuned model: generation ends at <|im_end|> (and [EOS]), and text that spells a chat
            marker out is encoded as that marker, which chat servers need (`moonlight.data.tokenizer`).

    Returns:
        False if `out` already was this very export.

    Raises:
        UserError: no usable checkpoint or tokenizer, or `out` exists with something else in it.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}: accepted are {', '.join(DTYPES)}")
    checkpoint = open_checkpoint(source)
    tokenizer = tokenizer or Path(checkpoint.run.data.tokenizer)
    ids = Tokenizer.load(tokenizer)
    if ids.sha256 != checkpoint.tokenizer_sha256:
        raise UserError(
            f"tokenizer {tokenizer} has checksum {ids.sha256[:12]}, the model was trained with "
            f"{checkpoint.tokenizer_sha256[:12]}: give that tokenizer with --tokenizer"
        )
    made_from = {
        "state_sha256": sha256_of(checkpoint.folder / "state.json"),
        "step": checkpoint.step,
        "tokenizer_sha256": ids.sha256,
        "dtype": dtype,
        "max_shard_bytes": max_shard_bytes,
        "chat": chat,
    }
    end_ids = [_end_of_message_id(tokenizer), ids.eos_id] if chat else [ids.eos_id]
    if out.exists():
        _check_same(out, made_from)
        return False
    with whole_folder(out) as part:
        _write_weights(checkpoint, part, DTYPES[dtype], max_shard_bytes)
        write_json(
            part / "config.json",
            hf_config(checkpoint.run.model, dtype=dtype, bos_id=ids.bos_id, eos_id=end_ids[0]),
        )
        write_json(
            part / "generation_config.json",
            generation_config(checkpoint.run.model, bos_id=ids.bos_id, eos_ids=end_ids),
        )
        for name in TOKENIZER_FILES:
            shutil.copyfile(tokenizer / name, part / name)
        if chat:
            set_chat_mode(part)
        files = {file.name: sha256_of(file) for file in sorted(part.iterdir())}
        write_json(part / EXPORT_FILE, {"made_from": made_from, "files": files})
    return True


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
        same = content["made_from"] == made_from and all(
            sha256_of(out / name) == known for name, known in content["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(f"{out} exists with something else in it: choose another folder, or remove it")


def _shards(checkpoint: Checkpoint, dtype: torch.dtype, max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors in order, cut where a shard would outgrow `max_bytes`."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for part, tensor in checkpoint.hugging_face_tensors():
        value = tensor if part.kind == "bias" else tensor.to(dtype)
        if shard and size + value.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[part.name] = value
        size += value.nbytes
    yield shard


def _count_shards(checkpoint: Checkpoint, dtype: torch.dtype, max_bytes: int) -> int:
    count, size = 1, 0
    for part in (part for row in mapping.table(checkpoint.run.model) for part in row.parts):
        nbytes = torch.Size(part.shape).numel() * (4 if part.kind == "bias" else dtype.itemsize)
        if size and size + nbytes > max_bytes:
            count, size = count + 1, 0
        size += nbytes
    return count


def _write_weights(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, max_bytes: int) -> None:
    """Safetensors shards and the index that names the shard of every tensor."""
    count = _count_shards(checkpoint, dtype, max_bytes)
    shard_of: dict[str, str] = {}
    total = 0
    shards = track(
        _shards(checkpoint, dtype, max_bytes),
        description="exporting",
        total=count,
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(shard, str(folder / name), metadata={"format": "pt"})
        shard_of |= dict.fromkeys(shard, name)
        total += sum(tensor.nbytes for tensor in shard.values())
    assert number == count, (number, count)
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": shard_of},
    )
