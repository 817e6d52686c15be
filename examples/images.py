"""Images of ten classes: the digits of scikit-learn, or CIFAR-10 from binary files or the Hugging Face Hub."""

import functools
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moonlight.errors import UserError

DIGITS, HUB = "digits", "hub"
HUB_REPOSITORY = "uoft-cs/cifar10"
HUB_FILES = {name: f"plain_text/{name}-00000-of-00001.parquet" for name in ("train", "test")}
BINARY_FILES = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
RECORD_BYTES = 1 + 3 * 32 * 32
"""Bytes of a record in the binary files of CIFAR-10: label, then red, green and blue planes, row by row."""
TEST_FRACTION = 0.2
"""Fraction of the digits, which have no split: every fifth image is a test image."""


@dataclass(frozen=True)
class Images:
    """Images float32 [count, channels, height, width], training mean 0 and deviation 1; labels int64 [count]."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor


@functools.lru_cache(maxsize=1)
def load_images(source: str) -> Images:
    """Read `source`: "digits", "hub", or a folder with the binary files of CIFAR-10.

    Raises:
        UserError: files are missing or invalid, the Hub is unreachable, or scikit-learn is not installed.
    """
    if source == DIGITS:
        pixels, labels = _digits()
        is_test = torch.arange(len(labels)) % round(1 / TEST_FRACTION) == 0
        parts = [pixels[~is_test], labels[~is_test], pixels[is_test], labels[is_test]]
    else:
        read = _from_hub if source == HUB else functools.partial(_from_folder, Path(source))
        parts = [tensor for split in ("train", "test") for tensor in read(split)]
    mean = parts[0].mean((0, 2, 3), keepdim=True)
    deviation = parts[0].std((0, 2, 3), keepdim=True)
    return Images((parts[0] - mean) / deviation, parts[1], (parts[2] - mean) / deviation, parts[3])


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits need scikit-learn: python -m pip install scikit-learn") from None
    digits = load_digits()
    return torch.from_numpy(digits.images).float().unsqueeze(1), torch.from_numpy(digits.target).long()


def _from_folder(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    records = []
    for name in BINARY_FILES[split]:
        path = folder / name
        if not path.is_file():
            raise UserError(
                f"{path} is missing: --data must be {DIGITS}, {HUB}, or a folder with CIFAR-10's binary files "
                f"({', '.join(BINARY_FILES['train'] + BINARY_FILES['test'])})"
            )
        content = np.fromfile(path, dtype=np.uint8)
        if not len(content) or len(content) % RECORD_BYTES:
            raise UserError(f"{path} has {len(content)} bytes: CIFAR-10 files have a multiple of {RECORD_BYTES}")
        records.append(content.reshape(-1, RECORD_BYTES))
        if (largest := int(records[-1][:, 0].max())) > 9:
            raise UserError(f"{path} has the label {largest}: CIFAR-10 labels are 0 to 9")
    data = torch.from_numpy(np.concatenate(records))
    return data[:, 1:].reshape(-1, 3, 32, 32).float(), data[:, 0].long()


def _from_hub(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(HUB_REPOSITORY, HUB_FILES[split], repo_type="dataset")
    except (OSError, ValueError, RuntimeError) as error:  # errors of the network, of the Hub, of its offline mode
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--data is {HUB}: {HUB_REPOSITORY} is not cached and cannot be loaded from the Hub ({reason}); give a "
            "folder with the binary files of CIFAR-10"
        ) from error
    return read_parquet(Path(path))


def read_parquet(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a Parquet file of the Hub, with PNG bytes in the column `img`.

    Returns:
        Images [count, 3, 32, 32], float32 from 0 to 255, and labels, int64 [count].
    """
    import pyarrow.parquet
    from PIL import Image

    table = pyarrow.parquet.read_table(path, columns=["img", "label"])
    pixels = [np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB")) for cell in table["img"].to_pylist()]
    return (
        torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().contiguous(),
        torch.tensor(table["label"].to_pylist(), dtype=torch.int64),
    )
