"""Bits per byte of held-out text with transformers, computed like validation in training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.folder import load_model
from moonlight.data.manifest import check_tokenizer, is_chat, load_manifest
from moonlight.data.tokenizer import Tokenizer
from moonlight.errors import UserError
from moonlight.progress import track_progress


@dataclass(frozen=True)
class HeldOutText:
    """The held-out split of a prepared data folder."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def split(self) -> dict[str, Any]:
        """The split's entry of the manifest."""
        return self.manifest["splits"]["validation"]


def open_held_out(folder: Path) -> HeldOutText:
    """Read the manifest of a folder of `moonlight data prepare`.

    Raises:
        UserError: `folder` is not prepared data, is corrupt, holds conversations, or has no held-out split.
    """
    manifest = load_manifest(folder)
    if is_chat(manifest):
        raise UserError(f"data {folder} holds conversations: give a folder of text from `moonlight data prepare`")
    if "validation" not in manifest["splits"]:
        raise UserError(f"data {folder} has no held-out documents: prepare it with --validation-share above 0")
    return HeldOutText(folder, manifest)


def check_same_tokenizer(data: HeldOutText, model: Path) -> int:
    """Return the end-of-text id of a model's folder; raise UserError unless `data` was prepared with its tokenizer."""
    tokenizer = Tokenizer.load(model)
    check_tokenizer(data.folder, data.manifest, tokenizer)
    return tokenizer.eos_id


def measure_bits_per_byte(
    model_folder: Path, data: HeldOutText, *, dtype: str, batch_size: int, sequence_length: int
) -> dict[str, float]:
    """Measure loss and bits per byte of all held-out tokens, in windows of `sequence_length` tokens as in validation.

    The first token of the text is predicted from the end-of-text id, any other from the previous tokens of its window.

    Returns:
        `loss` in nats per token, and `bits_per_byte`.

    Raises:
        UserError: transformers cannot load the model, or `data` was prepared with another tokenizer.
    """
    import torch

    from moonlight.data.loader import ValDataset, collate
    from moonlight.train.validate import bits_per_byte

    device = "cuda" if torch.cuda.is_available() else "cpu"
    samples = ValDataset(data.folder, sequence_length, check_same_tokenizer(data, model_folder))
    model = load_model(model_folder, dtype).to(device)
    nats = tokens = 0.0
    starts = range(0, len(samples), batch_size)
    with torch.no_grad():
        for start in track_progress(starts, f"{data.folder.name}: held-out text"):
            indices = range(start, min(start + batch_size, len(samples)))
            inputs, labels, mask = (tensor.to(device) for tensor in collate([samples[index] for index in indices]))
            logits = model(inputs).logits.float()
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            nats += (losses.double() * mask.flatten()).sum().item()
            tokens += mask.sum().item()
    assert tokens == data.split["tokens"], (tokens, data.split)
    loss = nats / tokens
    return {"loss": loss, "bits_per_byte": bits_per_byte(loss, data.split["tokens"], data.split["bytes"])}
