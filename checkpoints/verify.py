"""Check that a checkpoint and a Hugging Face folder hold the same model: every tensor, then the logits."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from checkpoints.hf_config import CONFIG_FILE, HF_NAMES, TRAINING_FIELDS, model_config_from_hf
from checkpoints.hf_folder import DTYPES, STALE_SUFFIX, HuggingFaceFolder, open_folder
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
MAX_SHOWN_PROBLEMS = 10
CHUNK_ELEMENTS = 1 << 22
BIAS_SUFFIX = ".e_score_correction_bias"
"""Suffix of router biases, which are float32 in every Moonlight export, and bfloat16 in other exports."""


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """Result of a verification."""

    tensors: int
    problems: list[str]
    """One line for each tensor that is missing, unknown, or differs in shape, dtype or value."""
    largest_logit: float = 0.0
    logit_difference: float = 0.0
    """Largest absolute difference between the float32 logits of Megatron and transformers."""
    tokens: int = 0
    different_routes: int = 0
    """Number of tokens, summed over layers, that the two models route to different sets of experts."""

    @property
    def passed(self) -> bool:
        """True if tensors and routes are equal and the logits agree to MAX_LOGIT_DIFFERENCE."""
        return not self.problems and self.logit_difference <= MAX_LOGIT_DIFFERENCE and not self.different_routes


def print_report(report: VerificationReport) -> None:
    """Print a table, then the first differences."""
    table = Table(show_header=False, title="Verification", title_justify="left")
    table.add_row("tensors", f"{report.tensors}, all compared" if not report.problems else f"{report.tensors}")
    table.add_row("different tensors", str(len(report.problems)))
    if report.tokens:
        table.add_row(
            "logits against Megatron",
            f"largest difference {report.logit_difference:.1e} over {report.tokens} tokens "
            f"(allowed {MAX_LOGIT_DIFFERENCE:.0e}, largest logit {report.largest_logit:.1f})",
        )
        table.add_row("tokens with different routes", str(report.different_routes))
    table.add_row("result", "the same model" if report.passed else "NOT the same model")
    console = Console(highlight=False)
    console.print(table)
    for problem in report.problems[:MAX_SHOWN_PROBLEMS]:
        console.print(problem, markup=False)
    if len(report.problems) > MAX_SHOWN_PROBLEMS:
        console.print(f"and {len(report.problems) - MAX_SHOWN_PROBLEMS} more")


def verify(source: Path, folder: Path, *, tensors_only: bool = False) -> VerificationReport:
    """Compare a checkpoint, or the newest one of a run, with a Hugging Face folder.

    Logits are compared in float32 on fixed prompts; both models use the weights as rounded for the folder. If nothing
    differs and the folder has checksums, `verification.json` in the folder records the result.

    Args:
        tensors_only: skip the logits, for a model that does not fit into memory.

    Raises:
        UserError: the checkpoint or the folder cannot be read.
    """
    checkpoint = open_checkpoint(source)
    hugging_face = open_folder(folder)
    declared = asdict(model_config_from_hf(hugging_face.config, folder / CONFIG_FILE))
    model_config = checkpoint.model_config
    if not declared["tie_word_embeddings"]:
        # With --untie, an export has the embedding again as the head.
        model_config = replace(model_config, tie_word_embeddings=False)
    tensors, problems = compare_tensors(checkpoint, model_config, hugging_face)
    problems += [
        f"{CONFIG_FILE}: {HF_NAMES.get(name, name)} is {declared[name]!r}, the checkpoint has {value!r}"
        for name, value in asdict(model_config).items()
        if name not in TRAINING_FIELDS and declared[name] != value
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
        result = {
            "passed": True,
            "sums_sha256": sha256_checksum(folder / SUMS_FILE),
            "tensors": tensors,
            "tokens": report.tokens,
            "largest_logit_difference": report.logit_difference,
            "different_choices_of_experts": report.different_routes,
        }
        write_json(folder / VERIFICATION_FILE, result)
    return report


def _compare_logits(
    report: VerificationReport, checkpoint: Checkpoint, folder: HuggingFaceFolder
) -> VerificationReport:
    model_config = checkpoint.model_config
    generator = torch.Generator().manual_seed(0)
    length = min(PROMPT_TOKENS, model_config.max_position_embeddings)
    prompts = torch.randint(0, model_config.vocab_size, (2, length), generator=generator)
    is_bfloat16 = "bfloat16" in (folder.config.get("dtype"), folder.config.get("torch_dtype"))
    logits, routes = run_megatron(checkpoint, prompts, torch.bfloat16 if is_bfloat16 else torch.float32)
    hf_logits, hf_routes = run_transformers(folder.path, prompts)
    return replace(
        report,
        largest_logit=hf_logits.abs().max().item(),
        logit_difference=(logits - hf_logits).abs().max().item(),
        tokens=prompts.numel(),
        different_routes=sum(int((a != b).any(-1).sum()) for a, b in zip(routes, hf_routes, strict=True)),
    )


def compare_tensors(
    checkpoint: Checkpoint, model_config: ModelConfig, folder: HuggingFaceFolder
) -> tuple[int, list[str]]:
    """Compare every tensor of both sides once.

    Args:
        model_config: the model of the folder; it may have a separate head although `checkpoint` is tied.

    Returns:
        Number of tensors of the folder, and one line per difference.
    """
    problems: list[str] = []
    names = set()
    for mapping in hf_mapping.tensor_mappings(model_config):
        for hf_tensor in mapping.hf_tensors:
            names.add(hf_tensor.name)
            tensor = folder.tensors.get(hf_tensor.name)
            if tensor is None:
                problems.append(f"{hf_tensor.name} is missing")
            elif tensor.shape != hf_tensor.shape:
                problems.append(f"{hf_tensor.name} has shape {tensor.shape}, expected {hf_tensor.shape}")
            elif tensor.dtype not in DTYPES:
                problems.append(f"{hf_tensor.name} is {tensor.dtype}, expected one of {', '.join(DTYPES)}")
            elif different := _count_different(tensor.read(), checkpoint.read_hf_tensor(mapping, hf_tensor)):
                total = torch.Size(hf_tensor.shape).numel()
                problems.append(f"{hf_tensor.name} differs in {different} of {total} values")
    dtypes = {folder.tensors[name].dtype for name in names & folder.tensors.keys() if not name.endswith(BIAS_SUFFIX)}
    if len(dtypes) > 1:
        problems.append(f"the weights are {' and '.join(sorted(dtypes))}, expected one dtype")
    unknown = folder.tensors.keys() - names
    problems += [f"{name} is not a tensor of the checkpoint" for name in unknown if not name.endswith(STALE_SUFFIX)]
    return len(folder.tensors), problems


def _count_different(actual: torch.Tensor, expected: torch.Tensor) -> int:
    """Count the values of `actual` that differ from `expected` in the dtype of `actual`, chunk by chunk."""
    step = max(1, CHUNK_ELEMENTS // actual[0].numel())
    pairs = zip(actual.split(step), expected.split(step), strict=True)
    return sum(int((left != right.to(left.dtype)).sum()) for left, right in pairs)


def _record_routes(module: torch.nn.Module, routes: list[torch.Tensor], index: int) -> None:
    """Append the expert ids, which are `index` of its output, to `routes` in each forward pass of `module`."""
    module.register_forward_hook(lambda _module, _args, output: routes.append(output[index].sort(-1).values.cpu()))


@torch.no_grad()
def run_megatron(
    checkpoint: Checkpoint, prompts: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run Megatron on `prompts`, int64 (batch, sequence).

    Returns:
        Logits (batch, sequence, vocabulary), and per layer with experts the sorted expert ids (tokens, k).
    """
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
            full = checkpoint.read(key)
            for offset, values in local_chunks(sharded).chunks:
                index = tuple(slice(start, start + size) for start, size in zip(offset, values.shape, strict=True))
                values.copy_(full[index] if key.endswith("expert_bias") else full[index].to(dtype))
        (model,) = models
        routes: list[torch.Tensor] = []
        for router in find_routers(models):
            _record_routes(router, routes, 1)
        tokens = prompts.to(torch.cuda.current_device())
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        logits = model.eval()(tokens, positions, None).cpu()
    finally:
        parallel.destroy_distributed()
    batch, length = prompts.shape
    # Megatron orders tokens sequence first, transformers batch first.
    reordered = [route.view(length, batch, -1).transpose(0, 1).flatten(0, 1) for route in routes]
    return logits, reordered


@torch.no_grad()
def run_transformers(folder: Path, prompts: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run transformers on `prompts` in float32; return the same as `run_megatron`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    routes: list[torch.Tensor] = []
    for layer in model.model.layers[model.config.first_k_dense_replace :]:
        _record_routes(layer.mlp.gate, routes, 2)
    return model(prompts).logits, routes
