"""Convolutional classifier with Muon and with AdamW: steps to 94% accuracy on test images.

    python -m examples.classifier                          # scikit-learn's digits, two minutes on two cores
    python -m examples.classifier --data cifar-10-batches-bin --device cuda
    python -m examples.classifier --data hub --device cuda

Muon updates the kernels [out, in, height, width] as matrices [out, in * height * width], AdamW the last layer and all
vectors. Both optimizers use one learning rate, the same weight decay and the same schedule.
"""

import functools
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from examples.images import DIGITS, Images, load_images
from examples.sweep import Outcome, Task, add_options, check_options, run
from moonlight.errors import UserError, report_errors
from moonlight.optim.muon import Muon
from pretrain.__main__ import Parser

CLASSES = 10
GROUPS = 4
WEIGHT_DECAY = 0.1
WARMUP_STEPS = 10


@dataclass(frozen=True)
class Preset:
    """Model and budget for a data set. The fields are part of results.json."""

    widths: tuple[int, ...]
    """Channels of each stage. A stage is two convolutions; pooling between stages halves height and width."""
    norm: str
    """group, which needs no batch statistics, or batch."""
    batch: int
    most_steps: int
    test_every: int
    decays: bool
    """True: the learning rate decays linearly to 0. False: it is constant after warm-up and needs no tuned schedule."""
    crop: int
    """Maximum shift of training images in pixels; above 0, they are also mirrored at random."""


PRESETS = {
    "digits": Preset(widths=(16, 32), norm="group", batch=64, most_steps=400, test_every=1, decays=False, crop=0),
    "cifar10": Preset(
        widths=(64, 256, 256), norm="batch", batch=1000, most_steps=1000, test_every=10, decays=True, crop=2
    ),
}


class Classifier(nn.Module):
    """Convolutions with norm and GELU, a mean over height and width, a linear layer."""

    def __init__(self, channels: int, preset: Preset) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, width in enumerate(preset.widths):
            for _ in range(2):
                norm = nn.BatchNorm2d(width) if preset.norm == "batch" else nn.GroupNorm(GROUPS, width)
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), norm, nn.GELU()]
                channels = width
            if index + 1 < len(preset.widths):
                layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, classes] for images [batch, channels, height, width], float32."""
        return self.head(self.body(images).mean((2, 3)))


def make_optimizer(model: Classifier, name: str, lr: float) -> torch.optim.Optimizer:
    """Return Muon for kernels with AdamW for the rest, or AdamW for all parameters."""
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    kernels = [parameter for parameter in model.body.parameters() if parameter.dim() == 4]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 4]
    groups = [{"params": kernels}, {"params": others, "algorithm": "adamw"}]
    return Muon(groups, lr=lr, weight_decay=WEIGHT_DECAY)


def batches(images: Images, preset: Preset, seed: int, device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of images and labels forever, reshuffled in each epoch; drop an incomplete last batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images.train), generator=generator)
        for indices in order.split(preset.batch)[: max(1, len(order) // preset.batch)]:
            batch = images.train[indices]
            if preset.crop:
                size, padded = batch.shape[-1], F.pad(batch, [preset.crop] * 4, mode="reflect")
                row, column = torch.randint(2 * preset.crop + 1, (2,), generator=generator).tolist()
                batch = padded[..., row : row + size, column : column + size]
                mirrored = torch.rand(len(batch), generator=generator) < 0.5
                batch = torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)
            yield batch.to(device), images.train_labels[indices].to(device)


@torch.no_grad()
def error_rate(model: Classifier, images: Images, device: str) -> float:
    """Return the error rate on the test images."""
    model.eval()
    num_errors = 0
    for batch, labels in zip(images.test.split(2000), images.test_labels.split(2000), strict=True):
        num_errors += int((model(batch.to(device)).argmax(-1).cpu() != labels).sum())
    model.train()
    return num_errors / len(images.test_labels)


def train(source: str, preset: Preset, target: float, device: str, name: str, lr: float, seed: int) -> Outcome:
    """Train until the error rate on the test images is at most `target`, or for `preset.most_steps` steps."""
    started = time.monotonic()
    images = load_images(source)
    torch.manual_seed(seed)
    model = Classifier(images.train.shape[1], preset).to(device)
    optimizer = make_optimizer(model, name, lr)
    curve: list[tuple[int, float]] = []
    for step, (batch, labels) in enumerate(batches(images, preset, seed, device), start=1):
        decay = 1 - (step - 1) / preset.most_steps if preset.decays else 1.0
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / WARMUP_STEPS) * decay
        loss = F.cross_entropy(model(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % preset.test_every and step < preset.most_steps:
            continue
        curve.append((step, error_rate(model, images, device)))
        if curve[-1][1] <= target:
            return Outcome(step, curve, time.monotonic() - started)
        if step == preset.most_steps or not math.isfinite(loss.item()):
            return Outcome(None, curve, time.monotonic() - started)
    raise AssertionError("batches never end")


def main() -> None:
    with report_errors(debug="--debug" in sys.argv):
        parser = Parser(prog="python -m examples.classifier", description=(__doc__ or "").splitlines()[0])
        parser.epilog = "Example: python -m examples.classifier --data cifar-10-batches-bin --device cuda"
        parser.add_argument("--data", default=DIGITS, help="digits, hub, or a folder with the binary files of CIFAR-10")
        parser.add_argument("--accuracy", type=float, default=0.94, help="target test accuracy; default: 0.94")
        add_options(parser)
        options = parser.parse_args()
        check_options(options)
        if not 0 < options.accuracy < 1:
            raise UserError(f"--accuracy is {options.accuracy}: it must be between 0 and 1")
        kind = "digits" if options.data == DIGITS else "cifar10"
        preset, target = PRESETS[kind], 1 - options.accuracy
        load_images(options.data)  # report unusable data before the runs start
        task = Task(
            name=f"{kind}: convolutional classifier",
            measured="error rate",
            target=round(target, 6),
            settings={"target": round(target, 6), "weight_decay": WEIGHT_DECAY, "warmup": WARMUP_STEPS}
            | {"preset": repr(preset)},
            train=functools.partial(train, options.data, preset, round(target, 6) + 1e-9, options.device),
        )
        run(task, options, "0.005,0.01,0.02", kind)


if __name__ == "__main__":
    main()
