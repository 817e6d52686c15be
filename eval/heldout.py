"""Bits per byte of held-out text, as validation in training counts them, by plain transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.folder import load_model
from moonlight.data.manifest import check_tokenizer, is_chat, load_manifest
from moonlight.data.tokenizer import Tokenizer
from moonlight.errors import UserError
from moonlight.progress import track_progress


@dataclass(frozen=True, kw_only=True)
class HeldOutText:
    """The held-out part of a prepared data folder, checked."""

    folder: Path
    documents: int
    tokens: int
    bytes: int
    compressed: dict[str, float]
    """Bits per byte that gzip -9 and xz -9 need for it."""
    manifest: dict[str, Any]


def open_held_out(folder: Path) -> HeldOutText:
    """Read the manifest of a folder of `moonlight data prepare`.

    Raises:
        UserError: it is none, is damaged, holds conversations, or nothing was held out.
    """
    manifest = load_manifest(folder)
    if is_chat(manifest):
        raise UserError(f"data {folder} holds conversations: give a folder of text, made by `moonlight data prepare`")
    split = manifest["splits"].get("validation")
    if split is None:
        raise UserError(f"data {folder} has no held-out documents: prepare it with --validation-share above 0")
    compressed = {name: 8 * split[f"{name}_bytes"] / split["compressed_text_bytes"] for name in ("gzip", "xz")}
    return HeldOutText(
        folder=folder,
        documents=split["documents"],
        tokens=split["tokens"],
        bytes=split["bytes"],
        compressed=compressed,
        manifest=manifest,
    )


def check_same_tokenizer(data: HeldOutText, model: Path) -> int:
    """The end-of-text id of a model's folder; raise UserError unless `data` was prepared with its tokenizer."""
    tokenizer = Tokenizer.load(model)
    check_tokenizer(data.folder, data.manifest, tokenizer)
    return tokenizer.eos_id


def measure_bits_per_byte(
    model_folder: Path, data: HeldOutText, *, dtype: str, batch_size: int, sequence_length: int
) -> dict[str, float]:
    """Loss and bits per byte of every held-out token, in windows of `sequence_length` tokens as in validation.

    The first token of all is predicted from the end-of-text id, every other from those before it in its window.

    Returns:
        `loss` in nats per token, and `bits_per_byte`.
    """
    import torch

    from moonlight.data.loader import ValDataset, collate
    from moonlight.train.validate import bits_per_byte as in_bits

    device = "cuda" if torch.cuda.is_available() else "cpu"
    samples = ValDataset(data.folder, sequence_length, check_same_tokenizer(data, model_folder))
    model = load_model(model_folder, dtype).to(device)
    nats = tokens = 0.0
    starts = range(0, len(samples), batch_size)
    with torch.no_grad():
        for start in track_progress(starts, f"{data.folder.name}: held-out text"):
            numbers = range(start, min(start + batch_size, len(samples)))
            inputs, labels, mask = (part.to(device) for part in collate([samples[number] for number in numbers]))
            logits = model(inputs).logits.float()
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            nats += (losses.double() * mask.flatten()).sum().item()
            tokens += mask.sum().item()
    assert tokens == data.tokens, (tokens, data.tokens)
    loss = nats / tokens
    return {"loss": loss, "bits_per_byte": in_bits(loss, data.tokens, data.bytes)}
