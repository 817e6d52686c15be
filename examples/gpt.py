"""Dense GPT with Muon and with AdamW: steps to a target loss on held-out text.

    python -m examples.gpt                                         # bytes of Python's standard library, on two cores
    python -m examples.gpt --data fineweb10B --device cuda         # NanoGPT speedrun: 124M parameters, target loss 3.28

The model is the plain form of the NanoGPT speedrun: RMS norm without gain, rotary embedding, normalized queries and
keys, squared ReLU, output projections initialized to zero. Muon updates all matrices between embedding and head, with
queries, keys and values as a stack [3, width, width]; AdamW updates embedding and head.
"""

import functools
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from examples.sweep import Outcome, Task, add_options, check_options, run
from examples.text import STANDARD_LIBRARY, draw, in_order, load_text
from moonlight.errors import report_errors
from moonlight.optim.muon import Muon
from pretrain.__main__ import Parser

WEIGHT_DECAY = 0.1
ROPE_THETA = 10000.0


@dataclass(frozen=True)
class Preset:
    """Shape and budget of a model. The fields are part of results.json."""

    layers: int
    width: int
    heads: int
    length: int
    batch: int
    """Sequences per step."""
    at_once: int
    """Sequences per forward pass."""
    warmup_steps: int
    most_steps: int
    test_every: int
    test_sequences: int
    decays: bool
    """True: the learning rate decays linearly to 0. False: it is constant after warm-up and needs no tuned schedule."""
    target: float
    rates: str


PRESETS = {
    "small": Preset(
        layers=3,
        width=64,
        heads=2,
        length=128,
        batch=16,
        at_once=16,
        warmup_steps=10,
        most_steps=1000,
        test_every=10,
        test_sequences=64,
        decays=False,
        target=2.15,
        rates="0.0025,0.005,0.01,0.02",
    ),
    "124m": Preset(
        layers=12,
        width=768,
        heads=6,
        length=1024,
        batch=512,
        at_once=32,
        warmup_steps=250,
        most_steps=9500,
        test_every=125,
        test_sequences=10240,
        decays=True,
        target=3.28,
        rates="0.0018,0.0036,0.0072",
    ),
}


class Block(nn.Module):
    """Attention and MLP; every parameter is a matrix or a stack of matrices."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        std = width**-0.5
        self.query_key_value = nn.Parameter(std * torch.randn(3, width, width))
        self.output = nn.Parameter(torch.zeros(width, width))
        self.up = nn.Parameter(std * torch.randn(4 * width, width))
        self.down = nn.Parameter(torch.zeros(width, 4 * width))

    def forward(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Apply the block to `x` [batch, length, width]; `rotation` is cosine and sine [length, head / 2]."""
        batch, length, width = x.shape
        qkv = F.linear(norm(x), self.query_key_value.flatten(0, 1)).view(batch, length, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, head]
        query, key = rotate(norm(query), rotation), rotate(norm(key), rotation)
        attention = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + F.linear(attention.transpose(1, 2).reshape(batch, length, width), self.output)
        return x + F.linear(F.linear(norm(x), self.up).relu().square(), self.down)


class GPT(nn.Module):
    """Language model; its output is the mean loss in nats per token."""

    def __init__(self, vocabulary: int, preset: Preset) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(vocabulary, preset.width))
        self.blocks = nn.ModuleList(Block(preset.width, preset.heads) for _ in range(preset.layers))
        self.head = nn.Parameter(torch.zeros(vocabulary, preset.width))
        head_width = preset.width // preset.heads
        inverse = ROPE_THETA ** (-torch.arange(0, head_width, 2) / head_width)
        angles = torch.arange(preset.length)[:, None] * inverse
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the mean loss over the last `length` tokens of int64 [batch, length + 1]."""
        x = norm(F.embedding(tokens[:, :-1], self.embedding))
        for block in self.blocks:
            x = block(x, (self.cosine, self.sine))
        return F.cross_entropy(F.linear(norm(x), self.head).float().flatten(0, 1), tokens[:, 1:].flatten())


def norm(x: torch.Tensor) -> torch.Tensor:
    """Return the RMS norm over the last dimension, without gain."""
    return F.rms_norm(x, x.shape[-1:])


def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Apply rotary embedding to [batch, heads, length, head], rotating the two halves of the last dimension."""
    cosine, sine = rotation
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1).type_as(x)


def make_optimizer(model: GPT, name: str, lr: float) -> torch.optim.Optimizer:
    """Return Muon for the matrices of the blocks with AdamW for embedding and head, or AdamW for all parameters."""
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    embeddings = {"params": [model.embedding, model.head], "algorithm": "adamw"}
    return Muon([{"params": list(model.blocks.parameters())}, embeddings], lr=lr, weight_decay=WEIGHT_DECAY)


@torch.no_grad()
def held_out_loss(model: GPT, windows: torch.Tensor, preset: Preset, device: str) -> float:
    """Return the mean loss over all tokens of `windows`, in nats per token."""
    total = 0.0
    for batch in windows.split(preset.at_once):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            total += len(batch) * model(batch.to(device)).item()
    return total / len(windows)


def train(source: str, preset: Preset, device: str, name: str, lr: float, seed: int) -> Outcome:
    """Train until the held-out loss is at most the target, or for `preset.most_steps` steps."""
    started = time.monotonic()
    text = load_text(source)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = GPT(text.vocabulary, preset).to(device)
    optimizer = make_optimizer(model, name, lr)
    windows = in_order(text.held_out, preset.test_sequences, preset.length)
    curve: list[tuple[int, float]] = []
    for step in range(1, preset.most_steps + 1):
        decay = 1 - (step - 1) / preset.most_steps if preset.decays else 1.0
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / preset.warmup_steps) * decay
        optimizer.zero_grad()
        for micro_batch in draw(text.train, preset.batch, preset.length, generator).split(preset.at_once):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = model(micro_batch.to(device)) * len(micro_batch) / preset.batch
            loss.backward()
        optimizer.step()
        if step % preset.test_every and step < preset.most_steps:
            continue
        curve.append((step, held_out_loss(model, windows, preset, device)))
        if curve[-1][1] <= preset.target:
            return Outcome(step, curve, time.monotonic() - started)
        if not math.isfinite(curve[-1][1]):
            break
    return Outcome(None, curve, time.monotonic() - started)


def main() -> None:
    with report_errors(debug="--debug" in sys.argv):
        parser = Parser(prog="python -m examples.gpt", description=(__doc__ or "").splitlines()[0])
        parser.epilog = "Example: python -m examples.gpt --data fineweb10B --device cuda"
        parser.add_argument("--data", default=STANDARD_LIBRARY, help="python, or a folder of FineWeb shards")
        add_options(parser)
        options = parser.parse_args()
        check_options(options)
        size = "small" if options.data == STANDARD_LIBRARY else "124m"
        preset = PRESETS[size]
        load_text(options.data)  # report unusable data before the runs start
        task = Task(
            name=f"GPT ({size})",
            measured="held-out loss",
            target=preset.target,
            settings={
                "data": Path(options.data).name,
                "preset": repr(replace(preset, rates="")),
                "weight_decay": WEIGHT_DECAY,
            },
            train=functools.partial(train, options.data, preset, options.device),
        )
        run(task, options, preset.rates, f"gpt-{size}")


if __name__ == "__main__":
    main()
