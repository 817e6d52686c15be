"""Tables of a model card as Markdown: architecture, data, training and results."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from checkpoints.hf_config import hf_config
from moonlight.config.model import ModelConfig
from moonlight.config.run import RunConfig
from moonlight.config.schedule import ScheduleConfig
from moonlight.config.timeline import RunSchedule
from moonlight.data.mixture import build_mixture
from moonlight.plan.flops import count_parameters, train_flops_per_token
from moonlight.train.metrics import CURVE_FILE

Manifests = Mapping[str, dict[str, Any]]
"""Manifest of each source of the training data, by name."""


def architecture(model_config: ModelConfig, dtype: str) -> Iterable[tuple[str, str]]:
    """Yield the rows of the architecture, as name and value; `dtype` is the dtype of the exported weights."""
    counts = count_parameters(model_config)
    yield "parameters", f"{counts.total:,}"
    yield "parameters, without embedding and head", f"{counts.total_without_embeddings:,}"
    yield "activated parameters per token, with head", f"{counts.activated_with_head:,}"
    yield "activated parameters per token, without embedding and head", f"{counts.activated:,}"
    dense = model_config.first_k_dense_replace
    which = f"the first {'one' if dense == 1 else dense}" if model_config.has_experts else "all"
    yield "layers", f"{model_config.num_hidden_layers}, {which} dense"
    yield "hidden size", f"{model_config.hidden_size:,}"
    yield (
        "attention",
        f"multi-head latent attention, {model_config.num_attention_heads} heads (query and key "
        f"{model_config.qk_nope_head_dim} + {model_config.qk_rope_head_dim} rotary, value {model_config.v_head_dim})",
    )
    yield "key-value LoRA rank", f"{model_config.kv_lora_rank:,}"
    q_lora_rank = model_config.q_lora_rank
    yield "query LoRA rank", "none (one full projection)" if q_lora_rank is None else f"{q_lora_rank:,}"
    if model_config.has_experts:
        per_token, num_shared = model_config.num_experts_per_tok, model_config.num_shared_experts
        yield "experts", f"{model_config.num_experts} routed ({per_token} per token), {num_shared} shared"
        if model_config.num_expert_groups > 1:
            yield "expert groups", f"{model_config.num_expert_groups} ({model_config.topk_group} per token)"
        yield "intermediate size of an expert", f"{model_config.moe_intermediate_size:,}"
    yield "intermediate size of a dense layer", f"{model_config.intermediate_size:,}"
    tied = hf_config(model_config)["tie_word_embeddings"]
    yield "vocabulary size", f"{model_config.vocab_size:,}; embedding and head are {'tied' if tied else 'not tied'}"
    yield "context length", f"{model_config.max_position_embeddings:,} (RoPE, base {model_config.rope_theta:,.0f})"
    yield "dtype of the weights", "float32" if dtype == "float32" else f"{dtype}, router biases float32"


def training_data(config: RunConfig, tokens: int, manifests: Manifests | None) -> str:
    """Return sources, licenses and sizes, from the manifests of `moonlight data prepare`.

    Args:
        tokens: number of tokens that the run trained on.
    """
    if manifests is None:
        return "The training data is unknown: its manifests were not available when this card was written."
    is_mixture = len(manifests) > 1
    rows = ["| source | license | documents | bytes of text | tokens |", "|---|---|---:|---:|---:|"]
    for name, manifest in manifests.items():
        for source in manifest["sources"]:
            label = f"{name}: " * is_mixture + last_component(source["path"])
            counts = " | ".join(f"{source[key]:,}" for key in ("documents", "bytes", "tokens"))
            rows.append(f"| {_cell(label)} | {_cell(source['license'])} | {counts} |")
    train = _sums(manifests, "train", ("tokens", "documents"))
    text = f"The training split has {train['tokens']:,} tokens in {format_count(train['documents'], 'document')}"
    if held_out := _sums(manifests, "validation", ("tokens", "documents")):
        documents = format_count(held_out["documents"], "document")
        text += f"; the held-out split has {held_out['tokens']:,} tokens in {documents}"
    text += f". The tokenizer has {next(iter(manifests.values()))['tokenizer']['num_ids']:,} ids."
    sections = ["\n".join(rows), text]
    if is_mixture:
        sections.append("\n".join(_mixture(config, tokens, manifests)))
    return "\n\n".join(sections)


def _mixture(config: RunConfig, tokens: int, manifests: Manifests) -> Iterable[str]:
    """Yield the lines of a table of the tokens that the run trained on, by source."""
    length = config.data.sequence_length
    yield "| source | tokens seen | fraction | epochs |"
    yield "|---|---:|---:|---:|"
    for name, count in build_mixture(config).counts(tokens // length).items():
        seen, stored = count * length, manifests[name]["splits"]["train"]["tokens"]
        yield f"| {_cell(name)} | {seen:,} | {seen / max(tokens, 1):.1%} | {seen / stored:.3g} |"


def _sums(manifests: Manifests, split: str, names: Sequence[str]) -> dict[str, int]:
    """Sum the fields `names` over the sources' splits; empty if a source lacks the split, or no source exists."""
    splits = [manifest["splits"].get(split) for manifest in manifests.values()]
    return {name: sum(fields[name] for fields in splits) for name in names} if splits and all(splits) else {}


def training(config: RunConfig, step: int, tokens: int, manifests: Manifests | None) -> Iterable[tuple[str, str]]:
    """Yield the rows of the training settings, as name and value; the run saw `tokens` tokens up to `step`."""
    train_config, parallel, schedule = config.train, config.parallel, RunSchedule(config)
    length = config.data.sequence_length
    epochs = ""
    if manifests and len(manifests) == 1:
        stored = _sums(manifests, "train", ("tokens",))["tokens"]
        if config.data.conversations:  # sequences end with padding
            stored = _sums(manifests, "train", ("windows",))["windows"] * length
        epochs = f" ({tokens / stored:.3g} epochs)"
    yield "tokens seen", f"{tokens:,}{epochs}{', including padding' if config.data.conversations else ''}"
    flops = tokens * train_flops_per_token(config.model, length)
    yield "FLOPs", f"{flops:.3g}, counted as 6 per token and activated parameter, with head, plus attention"
    yield "steps", f"{step:,} of {schedule.num_steps:,}"
    separation = {
        "no attention between them": config.data.mask_documents,
        "positions restart in each": config.data.reset_positions,
    }
    if any(separation.values()):
        kind = "conversations" if config.data.conversations else "documents"
        yield f"{kind} in a sequence", ", ".join(name for name, on in separation.items() if on)
    if config.data.conversations:
        yield "loss", "on the tokens of the assistant, up to and including the token that ends its turn"
    growth = "".join(f", {g.global_batch_size:,} after {g.after_tokens:,} tokens" for g in train_config.batch_growth)
    yield "global batch", f"{train_config.global_batch_size:,} sequences of {length:,} tokens{growth}"
    optimizer_config = config.optimizer
    adamw = (
        f"AdamW (betas {optimizer_config.adamw_beta1:g} and {optimizer_config.adamw_beta2:g}, epsilon "
        f"{optimizer_config.adamw_eps:g})"
    )
    if optimizer_config.name == "muon":
        nesterov = ", Nesterov" if optimizer_config.nesterov else ""
        by_head = ", attention split by head" if optimizer_config.matrices == "per_head" else ""
        yield (
            "optimizer",
            f"Muon on matrices (momentum {optimizer_config.momentum:g}{nesterov}, "
            f"{optimizer_config.num_newton_schulz_steps} Newton-Schulz steps with the {optimizer_config.coefficients} "
            f"coefficients, update scaled {_update_scale(config)}{by_head}); {adamw} on embedding, head and norms",
        )
    else:
        yield "optimizer", f"{adamw} on every parameter"
    yield "weight decay", f"{optimizer_config.weight_decay:g}"
    clip_grad_norm = optimizer_config.clip_grad_norm
    yield "gradient clipping", f"at norm {clip_grad_norm:g}" if clip_grad_norm else "none"
    if optimizer_config.qk_clip:
        yield "MuonClip", f"attention logits above {optimizer_config.qk_clip:g}"
    bias_update_rate = "the rate of each stage"
    if config.schedule:
        yield "learning rate", _learning_rate(config.schedule)
        bias_update_rate = f"{config.schedule.router_bias_update_rate:g} per step"
    for name, stage in config.stages.items():
        yield (
            f"stage {name}",
            f"{stage.from_tokens:,} to {stage.to_tokens:,} tokens; learning rate: {_learning_rate(stage)}; router "
            f"biases updated by {stage.router_bias_update_rate:g} per step",
        )
    if config.model.has_experts:
        yield (
            "expert load balancing",
            f"router biases updated by {bias_update_rate}; sequence-wise auxiliary loss with coefficient "
            f"{config.model.aux_loss_alpha:g}",
        )
    precision = "float32"
    if train_config.dtype != "float32":
        residual = ", float32 residual stream" if train_config.fp32_residual_connection else ""
        precision = f"{train_config.dtype} weights and activations{residual}, float32 master weights, "
        precision += f"{optimizer_config.gradient_dtype} gradient sums"
    yield "precision", precision
    sizes = {
        "tensor": parallel.tensor_parallel_size,
        "pipeline": parallel.pipeline_parallel_size,
        "expert": parallel.expert_parallel_size,
    }
    split = ", ".join(f"{size}-way {name} parallelism" for name, size in sizes.items() if size > 1)
    yield "parallelism", f"{split}, otherwise data parallelism" if split else "data parallelism only"
    yield "seed", str(train_config.seed)


def results(
    entries: Sequence[dict[str, Any]], step: int, manifests: Manifests | None, curve: bool, averaged: bool, dtype: str
) -> list[str]:
    """Return losses of the step or of the last validation, and bits per byte of compressors for comparison."""
    rows: dict[str, str] = {}
    last = entries[-1] if entries and entries[-1]["step"] == step else {}
    if "loss/train" in last:
        rows["training loss of the last step"] = f"{last['loss/train']:.4f} nats per token"
    if "loss/held_out" in last:
        rows["held-out loss"] = f"{last['loss/held_out']:.4f} nats per token"
    elif validated := [entry for entry in entries if "loss/validation" in entry]:
        where = "" if validated[-1]["step"] == step else f", after step {validated[-1]['step']:,}"
        rows["validation loss"] = f"{validated[-1]['loss/validation']:.4f} nats per token{where}"
    if "bits_per_byte/held_out" in last:
        rows["bits per byte of the held-out text"] = f"{last['bits_per_byte/held_out']:.3f}"
        names = ("gzip_bytes", "xz_bytes", "compressed_text_bytes")
        if held_out := _sums(manifests or {}, "validation", names):
            for program in ("gzip", "xz"):
                bits = 8 * held_out[f"{program}_bytes"] / held_out["compressed_text_bytes"]
                rows[f"bits per byte by {program} -9"] = f"{bits:.3f}"
    text = [markdown_table(rows.items())] if rows else ["No losses of this checkpoint are recorded."]
    if rows and averaged:
        text.append(f"These are losses of the weights after step {step:,}, before averaging.")
    if rows and dtype != "float32":
        text.append(f"The losses were measured before the export rounded the float32 master weights to {dtype}.")
    return [*text, f"![Loss over tokens]({CURVE_FILE})"] if curve else text


def markdown_table(rows: Iterable[tuple[str, str]]) -> str:
    """Return a Markdown table of two columns without a header."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)])


def _cell(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def last_component(path: str) -> str:
    """Return the last component of a path, so that a card shows no local folder names."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "unnamed"


def format_count(count: int, noun: str) -> str:
    """Return a number of things with their noun, which is given in the singular."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _update_scale(config: RunConfig) -> str:
    """Describe the scale of the orthogonalized update."""
    rms = f"{config.optimizer.rms_match:g}"
    return {
        "adjusted_lr": f"by {rms} * sqrt(max(rows, columns))",
        "update_norm": f"to an RMS of {rms}",
        "baseline": f"by {rms} * sqrt({config.model.hidden_size})",
    }[config.optimizer.rms_matching]


def _learning_rate(schedule: ScheduleConfig) -> str:
    """Describe the learning rate over a run or a stage."""
    warmup = f"warm-up over {format_count(schedule.warmup_steps, 'step')} to " if schedule.warmup_steps else ""
    if schedule.decay == "constant":
        return f"{warmup}{schedule.lr:g}, constant"
    return f"{warmup}{schedule.lr:g}, {schedule.decay} decay to {schedule.min_lr:g} at the last step"
