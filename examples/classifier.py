"""A convolutional classifier trained with Muon and with AdamW: steps until it names 94% of unseen pictures rightly.

    python -m examples.classifier                          # scikit-learn's digits, two minutes on two cores
    python -m examples.classifier --data cifar-10-batches-bin --device cuda
    python -m examples.classifier --data hub --device cuda

Muon takes the kernels [out, in, height, width] as matrices [out, in * height * width]; AdamW has the last layer and
all vectors. Both optimizers have one learning rate, the same weight decay and the same schedule.
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
    """What fits a data set."""

    widths: tuple[int, ...]
    """Of two convolutions each, with a halving of height and width between them."""
    norm: str
    """group, which needs no statistics of a batch, or batch."""
    batch: int
    most_steps: int
    test_every: int
    decays: bool
    """The rate falls to 0 in a line; else it is constant after warm-up, so that no schedule has to be tuned."""
    crop: int
    """Pixels by which training pictures are shifted; with it they are mirrored too."""


PRESETS = {
    "digits": Preset(widths=(16, 32), norm="group", batch=64, most_steps=400, test_every=1, decays=False, crop=0),
    "cifar10": Preset(
        widths=(64, 256, 256), norm="batch", batch=1000, most_steps=1000, test_every=10, decays=True, crop=2
    ),
}


class Classifier(nn.Module):
    """Convolutions with norm and GELU, a mean over what is left of the picture, a linear layer."""

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

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(pictures).mean((2, 3)))


def make_optimizer(model: Classifier, name: str, rate: float) -> torch.optim.Optimizer:
    """Muon for kernels and AdamW for the rest, or AdamW for all."""
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    kernels = [parameter for parameter in model.body.parameters() if parameter.dim() == 4]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 4]
    groups = [{"params": kernels}, {"params": others, "algorithm": "adamw"}]
    return Muon(groups, lr=rate, weight_decay=WEIGHT_DECAY)


def batches(images: Images, preset: Preset, seed: int, device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Shuffled anew in every epoch; what does not fill a batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images.train), generator=generator)
        for chosen in order.split(preset.batch)[: max(1, len(order) // preset.batch)]:
            pictures = images.train[chosen]
            if preset.crop:
                size, wide = pictures.shape[-1], F.pad(pictures, [preset.crop] * 4, mode="reflect")
                row, column = torch.randint(2 * preset.crop + 1, (2,), generator=generator).tolist()
                pictures = wide[..., row : row + size, column : column + size]
                mirrored = torch.rand(len(pictures), generator=generator) < 0.5
                pictures = torch.where(mirrored[:, None, None, None], pictures.flip(-1), pictures)
            yield pictures.to(device), images.train_labels[chosen].to(device)


@torch.no_grad()
def share_of_errors(model: Classifier, images: Images, device: str) -> float:
    """Of the pictures held out."""
    model.eval()
    wrong = 0
    for pictures, labels in zip(images.test.split(2000), images.test_labels.split(2000), strict=True):
        wrong += int((model(pictures.to(device)).argmax(-1).cpu() != labels).sum())
    model.train()
    return wrong / len(images.test_labels)


def train(source: str, preset: Preset, target: float, device: str, name: str, rate: float, seed: int) -> Outcome:
    """One run, until the share of errors is at most `target`."""
    started = time.monotonic()
    images = load_images(source)
    torch.manual_seed(seed)
    model = Classifier(images.train.shape[1], preset).to(device)
    optimizer = make_optimizer(model, name, rate)
    curve: list[tuple[int, float]] = []
    for step, (pictures, labels) in enumerate(batches(images, preset, seed, device), start=1):
        left = 1 - (step - 1) / preset.most_steps if preset.decays else 1.0
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / WARMUP_STEPS) * left
        loss = F.cross_entropy(model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % preset.test_every and step < preset.most_steps:
            continue
        curve.append((step, share_of_errors(model, images, device)))
        if curve[-1][1] <= target:
            return Outcome(step, curve, time.monotonic() - started)
        if step == preset.most_steps or not math.isfinite(loss.item()):
            return Outcome(None, curve, time.monotonic() - started)
    raise AssertionError("batches never end")


def main() -> None:
    with report_errors(debug="--debug" in sys.argv):
        parser = Parser(prog="python -m examples.classifier", description=(__doc__ or "").splitlines()[0])
        parser.epilog = "Example: python -m examples.classifier --data cifar-10-batches-bin --device cuda"
        parser.add_argument("--data", default=DIGITS, help="digits, hub, or a folder with CIFAR-10's binary files")
        parser.add_argument("--accuracy", type=float, default=0.94, help="share of unseen pictures to name rightly")
        add_options(parser)
        given = parser.parse_args()
        check_options(given)
        if not 0 < given.accuracy < 1:
            raise UserError(f"--accuracy is {given.accuracy}: it must be between 0 and 1")
        kind = "digits" if given.data == DIGITS else "cifar10"
        preset, target = PRESETS[kind], 1 - given.accuracy
        load_images(given.data)  # what cannot be used is said before work starts
        task = Task(
            name=f"{kind}: convolutional classifier",
            measured="share of errors",
            target=round(target, 6),
            settings={"target": round(target, 6), "weight_decay": WEIGHT_DECAY, "warmup": WARMUP_STEPS}
            | {"preset": repr(preset)},
            train=functools.partial(train, given.data, preset, round(target, 6) + 1e-9, given.device),
        )
        run(task, given, "0.005,0.01,0.02", kind)


if __name__ == "__main__":
    main()
