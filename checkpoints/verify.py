"""Proof that a checkpoint and a Hugging Face folder hold the same model: every tensor, then the logits."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open

from checkpoints.export import DTYPES
from checkpoints.reader import Checkpoint, open_checkpoint
from moonlight.config import Parallel
from moonlight.errors import UserError

MAX_LOGIT_DIFFERENCE = 1e-4
PROMPT_TOKENS = 64
SHOWN_PROBLEMS = 10


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was compared and what was found."""

    tensors: int
    problems: list[str]
    """One line for each tensor that is missing, unknown, doubled, or differs in shape, dtype or value."""
    largest_logit: float
    logit_difference: float
    """Largest absolute difference between Megatron's logits and transformers', float32."""
    tokens: int
    different_routes: int
    """Tokens, counted once per layer, that the two sent to different sets of experts."""

    @property
    def passed(self) -> bool:
        """Whether nothing differs."""
        return not self.problems and self.logit_difference <= MAX_LOGIT_DIFFERENCE and not self.different_routes


def print_report(report: Report) -> None:
    """One table on the terminal, and the first differences below it."""
    table = Table(show_header=False, title="Verification", title_justify="left")
    table.add_row(
        "tensors",
        f"{report.tensors}, each accounted for once" if not report.problems else f"{report.tensors}",
    )
    table.add_row("different tensors", str(len(report.problems)))
    if report.tokens:
        table.add_row(
            "logits against Megatron",
            f"largest difference {report.logit_difference:.1e} over {report.tokens} tokens "
            f"(allowed {MAX_LOGIT_DIFFERENCE:.0e}, largest logit {report.largest_logit:.1f})",
        )
        table.add_row("different choices of experts", str(report.different_routes))
    table.add_row("result", "the same model" if report.passed else "NOT the same model")
    console = Console(highlight=False)
    console.print(table)
    for problem in report.problems[:SHOWN_PROBLEMS]:
        console.print(problem, markup=False)
    if len(report.problems) > SHOWN_PROBLEMS:
        console.print(f"and {len(report.problems) - SHOWN_PROBLEMS} more")


def verify(source: Path, folder: Path) -> Report:
    """Compare the checkpoint (or the newest of a run) with the Hugging Face folder.

    Logits are compared in float32 on fixed prompts, both sides holding the weights as rounded for the folder.

    Raises:
        UserError: one of the two cannot be read.
    """
    checkpoint = open_checkpoint(source)
    tensors, problems = compare_tensors(checkpoint, folder)
    if problems:
        return Report(
            tensors=tensors,
            problems=problems,
            largest_logit=0,
            logit_difference=0,
            tokens=0,
            different_routes=0,
        )
    generator = torch.Generator().manual_seed(0)
    length = min(PROMPT_TOKENS, checkpoint.run.model.max_position_embeddings)
    prompts = torch.randint(0, checkpoint.run.model.vocab_size, (2, length), generator=generator)
    ours, our_routes = _megatron(checkpoint, prompts, _dtype(folder))
    theirs, their_routes = _transformers(folder, prompts)
    different = sum(int((a != b).any(-1).sum()) for a, b in zip(our_routes, their_routes, strict=True))
    return Report(
        tensors=tensors,
        problems=[],
        largest_logit=theirs.abs().max().item(),
        logit_difference=(ours - theirs).abs().max().item(),
        tokens=prompts.numel(),
        different_routes=different,
    )


def _read(folder: Path, name: str, key: str) -> Any:
    """The value of `key` in one of the folder's JSON files."""
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} is no Hugging Face folder: it has no readable {name} with {key} in it") from None


def _dtype(folder: Path) -> torch.dtype:
    name = _read(folder, "config.json", "torch_dtype")
    if name not in DTYPES:
        raise UserError(f"{folder / 'config.json'} says torch_dtype {name!r}: accepted are {', '.join(DTYPES)}")
    return DTYPES[name]


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{file} is damaged: {error}") from None


def compare_tensors(checkpoint: Checkpoint, folder: Path) -> tuple[int, list[str]]:
    """Number of tensors compared, and one line per difference; every tensor of both sides is accounted for once."""
    dtype = _dtype(folder)
    problems: list[str] = []
    owner: dict[str, Path] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} is no Hugging Face folder: it has no .safetensors file")
    opened = {file: _open(file) for file in files}
    for file, handle in opened.items():
        for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
            if name in owner:
                problems.append(f"{name} is in {owner[name].name} and again in {file.name}")
            owner[name] = file
    if _read(folder, "model.safetensors.index.json", "weight_map") != {name: file.name for name, file in owner.items()}:
        problems.append("model.safetensors.index.json does not name the files' tensors")
    seen = set()
    for part, value in checkpoint.hugging_face_tensors():
        seen.add(part.name)
        if part.name not in owner:
            problems.append(f"{part.name} is missing")
            continue
        found = opened[owner[part.name]].get_tensor(part.name)
        wanted = value if part.kind == "bias" else value.to(dtype)
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            problems.append(
                f"{part.name} is {found.dtype} {tuple(found.shape)}, expected {wanted.dtype} {tuple(wanted.shape)}"
            )
        elif not torch.equal(found, wanted):
            problems.append(f"{part.name} differs in {int((found != wanted).sum())} of {found.numel()} values")
    problems += [f"{name} belongs to no tensor of the checkpoint" for name in owner if name not in seen]
    return len(owner), problems


def _record(module: torch.nn.Module, routes: list[torch.Tensor], of: Callable[[Any], torch.Tensor]) -> None:
    module.register_forward_hook(lambda _module, _args, output: routes.append(of(output)))


@torch.no_grad()
def _megatron(
    checkpoint: Checkpoint, prompts: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [batch, sequence, vocabulary] and, per layer with experts, the choice as booleans [tokens, experts]."""
    from moonlight import parallel
    from moonlight.model.build import build_model
    from moonlight.model.shards import sharded_state
    from moonlight.train.step import routers

    run = replace(
        checkpoint.run,
        parallel=Parallel(),
        train=replace(checkpoint.run.train, dtype="float32"),
        optimizer=replace(checkpoint.run.optimizer, master_weights="float32"),
    )
    parallel.join_alone()
    try:
        parallel.build_groups(run.parallel, seed=0)
        models = build_model(run)
        for key, sharded in sharded_state(models).items():
            value = checkpoint.read(key)
            bias = key.endswith("expert_bias")
            sharded.data.detach().copy_(value if bias else value.to(dtype))
        (model,) = models
        routes: list[torch.Tensor] = []
        for router in routers(models):
            _record(router, routes, lambda output: output[1].cpu())
        tokens = prompts.to(torch.cuda.current_device())
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        logits = model.eval()(tokens, positions, None).cpu()
    finally:
        parallel.leave_world()
    batch, length = prompts.shape
    # Megatron's tokens run sequence first, transformers' batch first.
    reordered = [route.view(length, batch, -1).transpose(0, 1).flatten(0, 1) for route in routes]
    return logits, reordered


@torch.no_grad()
def _transformers(folder: Path, prompts: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The same of the exported folder, by plain transformers in float32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    experts = model.config.n_routed_experts
    routes: list[torch.Tensor] = []
    for layer in model.model.layers[model.config.first_k_dense_replace :]:
        _record(
            layer.mlp.gate,
            routes,
            lambda output: torch.zeros(len(output[2]), experts, dtype=torch.bool).scatter(1, output[2], True),
        )
    return model(prompts).logits, routes
