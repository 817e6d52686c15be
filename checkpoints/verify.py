"""Proof that a checkpoint and a Hugging Face folder hold the same model: every tensor, then the logits."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from checkpoints.hf_config import NAMES, OF_TRAINING, model_config_from_hf
from checkpoints.hf_folder import DTYPES, STALE, HuggingFaceFolder, open_folder
from checkpoints.reader import Checkpoint, open_checkpoint
from moonlight.config.data import DataConfig
from moonlight.config.model import ModelConfig
from moonlight.config.run import RunConfig
from moonlight.config.schedule import ScheduleConfig
from moonlight.config.train import TrainConfig
from moonlight.dist_checkpoint import hf_mapping
from moonlight.errors import UserError
from moonlight.files import SUMS_FILE, VERIFICATION_FILE, check_sums, sha256_checksum, write_json

MAX_LOGIT_DIFFERENCE = 1e-4
PROMPT_TOKENS = 64
SHOWN_PROBLEMS = 10
ELEMENTS_AT_ONCE = 1 << 22
BIAS = ".e_score_correction_bias"
"""Ending of tensors that are float32 whatever the rest is, and bfloat16 in models that others exported."""


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """What was compared and what was found."""

    tensors: int
    problems: list[str]
    """One line for each tensor that is missing, unknown, or differs in shape, dtype or value."""
    largest_logit: float = 0.0
    logit_difference: float = 0.0
    """Largest absolute difference between Megatron's logits and transformers', float32."""
    tokens: int = 0
    different_routes: int = 0
    """Tokens, counted once per layer, that the two sent to different sets of experts."""

    @property
    def passed(self) -> bool:
        """Whether nothing differs."""
        return not self.problems and self.logit_difference <= MAX_LOGIT_DIFFERENCE and not self.different_routes


def print_report(report: VerificationReport) -> None:
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


def verify(source: Path, folder: Path, *, tensors_only: bool = False) -> VerificationReport:
    """Compare the checkpoint (or the newest of a run) with the Hugging Face folder.

    Logits are compared in float32 on fixed prompts, both sides holding the weights as rounded for the folder. If all is
    the same and the folder has checksums, `verification.json` beside them says so.

    Args:
        tensors_only: leave the logits out, for a model that does not fit into memory.

    Raises:
        UserError: one of the two cannot be read.
    """
    checkpoint = open_checkpoint(source)
    hugging_face = open_folder(folder)
    declared = asdict(model_config_from_hf(hugging_face.config, folder / "config.json"))
    model_config = checkpoint.model_config
    if not declared["tie_word_embeddings"]:
        model_config = replace(
            model_config, tie_word_embeddings=False
        )  # exported with --untie: the head is the embedding again
    tensors, problems = compare_tensors(checkpoint, model_config, hugging_face)
    problems += [
        f"config.json says {NAMES.get(name, name)} {declared[name]!r}, the checkpoint has {value!r}"
        for name, value in asdict(model_config).items()
        if name not in OF_TRAINING and declared[name] != value
    ]
    if (folder / SUMS_FILE).exists():
        try:
            check_sums(folder)
        except UserError as error:
            problems.append(str(error))
    report = VerificationReport(tensors=tensors, problems=problems)
    if not problems and not tensors_only:
        report = _compare_logits(report, checkpoint, hugging_face)
    if report.passed and not tensors_only and (folder / SUMS_FILE).exists():
        found = {
            "passed": True,
            "sums_sha256": sha256_checksum(folder / SUMS_FILE),
            "tensors": tensors,
            "tokens": report.tokens,
            "largest_logit_difference": report.logit_difference,
            "different_choices_of_experts": report.different_routes,
        }
        write_json(folder / VERIFICATION_FILE, found)
    return report


def _compare_logits(
    report: VerificationReport, checkpoint: Checkpoint, folder: HuggingFaceFolder
) -> VerificationReport:
    model_config = checkpoint.model_config
    generator = torch.Generator().manual_seed(0)
    length = min(PROMPT_TOKENS, model_config.max_position_embeddings)
    prompts = torch.randint(0, model_config.vocab_size, (2, length), generator=generator)
    in_bfloat16 = "bfloat16" in (folder.config.get("dtype"), folder.config.get("torch_dtype"))
    ours, our_routes = _megatron(checkpoint, prompts, torch.bfloat16 if in_bfloat16 else torch.float32)
    theirs, their_routes = _transformers(folder.path, prompts)
    return replace(
        report,
        largest_logit=theirs.abs().max().item(),
        logit_difference=(ours - theirs).abs().max().item(),
        tokens=prompts.numel(),
        different_routes=sum(int((a != b).any(-1).sum()) for a, b in zip(our_routes, their_routes, strict=True)),
    )


def compare_tensors(
    checkpoint: Checkpoint, model_config: ModelConfig, folder: HuggingFaceFolder
) -> tuple[int, list[str]]:
    """Number of tensors compared, and one line per difference; every tensor of both sides is accounted for once.

    Args:
        model: of the folder, which has a head of its own where `checkpoint` may have tied embeddings.
    """
    problems: list[str] = []
    names = set()
    for row in hf_mapping.tensor_mappings(model_config):
        for part in row.hf_tensors:
            names.add(part.name)
            tensor = folder.tensors.get(part.name)
            if tensor is None:
                problems.append(f"{part.name} is missing")
            elif tensor.shape != part.shape:
                problems.append(f"{part.name} has shape {tensor.shape}, expected {part.shape}")
            elif tensor.dtype not in DTYPES:
                problems.append(f"{part.name} is {tensor.dtype}, expected one of {', '.join(DTYPES)}")
            elif different := _count_different(tensor.read(), checkpoint.read_hf_tensor(row, part)):
                problems.append(f"{part.name} differs in {different} of {torch.Size(part.shape).numel()} values")
    kinds = {folder.tensors[name].dtype for name in names & folder.tensors.keys() if not name.endswith(BIAS)}
    if len(kinds) > 1:
        problems.append(f"the weights are {' and '.join(sorted(kinds))}, expected one dtype")
    unknown = folder.tensors.keys() - names
    problems += [f"{name} belongs to no tensor of the checkpoint" for name in unknown if not name.endswith(STALE)]
    return len(folder.tensors), problems


def _count_different(actual: torch.Tensor, value: torch.Tensor) -> int:
    """Values of `found` that are not those of `value` in its dtype, a few rows at a time."""
    step = max(1, ELEMENTS_AT_ONCE // actual[0].numel())
    pairs = zip(actual.split(step), value.split(step), strict=True)
    return sum(int((mine != wanted.to(mine.dtype)).sum()) for mine, wanted in pairs)


def _record(module: torch.nn.Module, routes: list[torch.Tensor], of: Callable[[Any], torch.Tensor]) -> None:
    module.register_forward_hook(lambda _module, _args, output: routes.append(of(output)))


@torch.no_grad()
def _megatron(
    checkpoint: Checkpoint, prompts: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [batch, sequence, vocabulary] and, per layer with experts, the chosen ones [tokens, k] in order."""
    from moonlight import parallel
    from moonlight.model.build import build_model
    from moonlight.model.shards import collect_sharded_tensors, local_chunks
    from moonlight.train.forward_backward import find_routers

    config = RunConfig(
        name="verify",
        model=checkpoint.model_config,
        data=DataConfig(path="none", tokenizer="", sequence_length=prompts.shape[1]),
        schedule=ScheduleConfig(lr=1.0),
        train=TrainConfig(train_steps=1, global_batch_size=1, micro_batch_size=1),
    )
    parallel.init_single_process()
    try:
        parallel.init_model_parallel(config.parallel, seed=0)
        models = build_model(config)
        for key, sharded in collect_sharded_tensors(models).items():
            whole = checkpoint.read(key)
            for offset, values in local_chunks(sharded).chunks:
                where = tuple(slice(start, start + size) for start, size in zip(offset, values.shape, strict=True))
                values.copy_(whole[where] if key.endswith("expert_bias") else whole[where].to(dtype))
        (model,) = models
        routes: list[torch.Tensor] = []
        for router in find_routers(models):
            _record(router, routes, lambda output: output[1].sort(-1).values.cpu())
        tokens = prompts.to(torch.cuda.current_device())
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        logits = model.eval()(tokens, positions, None).cpu()
    finally:
        parallel.destroy_distributed()
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
    routes: list[torch.Tensor] = []
    for layer in model.model.layers[model.config.first_k_dense_replace :]:
        _record(layer.mlp.gate, routes, lambda output: output[2].sort(-1).values)
    return model(prompts).logits, routes
