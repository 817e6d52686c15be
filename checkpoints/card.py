"""The model card of an exported folder: its README.md, with what is known of the run and nothing else."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from checkpoints.card_text import method, usage
from checkpoints.hf_config import hf_config
from moonlight import __version__
from moonlight.config import Run
from moonlight.config_model import Model
from moonlight.flops import count_parameters, train_flops_per_token
from moonlight.train.metrics import CURVE_FILE

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")
_PLACEHOLDERS = re.compile(r"\[(?i:more information needed)\]|\b(?:TODO|TBD|FIXME)\b|\{\{.*?\}\}")
_OWN_PATHS = re.compile(r"(?<![\w:/.])(?:/(?:home|root|Users|tmp|mnt|var|opt)/|[A-Z]:\\)[^\s`|)]*")


def model_card(
    *,
    model: Model,
    name: str,
    step: int,
    dtype: str,
    license: str | None,
    chat: bool,
    run: Run | None,
    consumed_tokens: int,
    metrics: Sequence[dict[str, Any]],
    manifest: dict[str, Any] | None,
    imported_from: str | None,
    evaluation: str | None,
    curve: bool,
    averaged_steps: Sequence[int] = (),
) -> str:
    """The README.md of an exported Hugging Face folder. What is None or empty is left out, or said to be unknown.

    Args:
        name: title, and what stands for the model in commands: its name on the Hub, or that of the run.
        step: of the checkpoint; of the last one, if several were averaged.
        dtype: of the exported weights.
        license: identifier of the model's licence as the Hub knows it (apache-2.0), or a name of one's own.
        chat: whether it was trained on conversations and is asked through its chat template.
        run: the recipe that trained it; None if nothing was trained since the import.
        metrics: objects of metrics.jsonl; those of later steps than `step` are not used.
        manifest: of the prepared data that it was trained on.
        imported_from: Hub name (owner/name) of the model whose weights came first. Anything else counts as a path,
            of which only the last component is told.
        evaluation: Markdown with results of benchmarks.
        curve: whether the folder holds loss.png.
        averaged_steps: of the checkpoints whose mean the weights are; empty for a single checkpoint.
    """
    license = None if license is None or license.strip().lower() in ("", "unknown") else license.strip()
    at_step = [entry for entry in metrics if entry["step"] <= step]
    trained = run is not None
    sections = [
        f"# {name}",
        _summary(model, run, step, chat, imported_from, averaged_steps),
        f"Licence: {license}." if license else "The licence of this model is not stated.",
        "## Use",
        usage(model, name, chat=chat, trained=trained),
        "## Architecture",
        _table(_architecture(model, dtype)),
    ]
    if run is not None:
        sections += [
            "## Training data",
            _data(manifest),
            "## Training",
            _table(_training(run, step, consumed_tokens, manifest)),
            "## Results",
            *_results(at_step, step, manifest, curve, bool(averaged_steps)),
        ]
    elif evaluation:
        sections.append("## Results")
    if evaluation:
        sections += ["### Evaluation", re.sub(r"(?m)^(#{1,3} )", r"###\1", evaluation.strip())]
    sections += [
        "## Limitations",
        "No test of safety, bias or truthfulness belongs to this card. "
        + ("It" if chat else "The model continues text and was not trained to follow instructions; it")
        + " can state falsehoods fluently and repeat what its training data contains.",
        "## How it was made",
        method(run, __version__),
    ]
    return f"---\n{_front_matter(license, chat, run, imported_from)}\n---\n\n" + "\n\n".join(sections) + "\n"


def missing_of_card(text: str) -> list[str]:
    """What a release still lacks in the model card `text`, one phrase each; empty if it is complete."""
    if not text.startswith("---"):
        return ["front matter between two lines of ---"]
    try:
        card = ModelCard(text)
    except yaml.YAMLError:
        return ["front matter that is YAML"]
    except (TypeError, ValueError):
        return ["front matter of keys and values as the Hub knows them"]
    data, missing = card.data, []
    if not data.to_dict():
        return ["front matter between two lines of ---"]
    license = str(data.get("license", "")).strip().lower()
    if license in ("", "none", "unknown"):
        missing.append("a licence")
    elif license == "other" and not data.get("license_name"):
        missing.append("the name of its licence (license_name)")
    if not card.text.strip():
        missing.append("a text below its front matter")
    missing += [f"what belongs in place of {found}" for found in dict.fromkeys(_PLACEHOLDERS.findall(text))]
    missing += [f"a public name in place of {found}" for found in dict.fromkeys(_OWN_PATHS.findall(text))]
    return missing


def _front_matter(license: str | None, chat: bool, run: Run | None, imported_from: str | None) -> str:
    is_id = license is not None and _LICENSE_ID.fullmatch(license.lower())
    muon = run is not None and run.optimizer.name == "muon"
    data = ModelCardData(
        license=license.lower() if license and is_id else "other" if license else None,
        license_name=None if is_id else license,
        base_model=imported_from if imported_from and _HUB_NAME.fullmatch(imported_from) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["deepseek_v3", "moe", *["muon"] * muon, "moonlight-stack", *["conversational"] * chat],
    )
    return data.to_yaml()


def _summary(
    model: Model, run: Run | None, step: int, chat: bool, imported_from: str | None, averaged_steps: Sequence[int]
) -> str:
    counts = count_parameters(model)
    text = (
        f"A mixture-of-experts language model of the DeepSeek-V3 architecture with {_short(counts.total)} parameters, "
        f"of which {_short(counts.activated_with_head)} are activated for each token."
    )
    origin = imported_from and (
        f"[{imported_from}](https://huggingface.co/{imported_from})"
        if _HUB_NAME.fullmatch(imported_from)
        else f"`{_last(imported_from)}`"
    )
    if run is None:
        return f"{text} Its weights were imported from {origin or 'another model'}; nothing was trained since then."
    kind = "fine-tuned on conversations" if chat else "trained further" if origin else "trained from random weights"
    text += f" It was {kind} for {_steps(step)}"
    text += f", beginning with the weights of {origin}." if origin else "."
    if averaged_steps:
        steps = ", ".join(f"{number:,}" for number in averaged_steps)
        text += f" Its weights are the mean of the checkpoints after steps {steps}."
    if step < run.train.train_steps:
        text += f" The run was planned for {run.train.train_steps:,} steps: this is a checkpoint on the way."
    return text


def _architecture(model: Model, dtype: str) -> Iterable[tuple[str, str]]:
    counts = count_parameters(model)
    yield "parameters", f"{counts.total:,}"
    yield "without embedding and head", f"{counts.total_without_embeddings:,}"
    yield "activated by a token, with the head", f"{counts.activated_with_head:,}"
    yield "activated by a token, without it", f"{counts.activated:,}"
    yield "layers", f"{model.num_hidden_layers}, the first {model.first_k_dense_replace} of them dense"
    yield "hidden size", f"{model.hidden_size:,}"
    yield (
        "attention",
        f"multi-head latent attention, {model.num_attention_heads} heads (query and key "
        f"{model.qk_nope_head_dim} + {model.qk_rope_head_dim} rotary, value {model.v_head_dim})",
    )
    query = "none" if model.q_lora_rank is None else f"{model.q_lora_rank:,}"
    yield "rank of compressed keys and values; queries", f"{model.kv_lora_rank:,}; {query}"
    shared = model.num_shared_experts
    yield "experts", f"{model.num_experts} routed, {model.num_experts_per_tok} of them for a token, and {shared} shared"
    if model.num_expert_groups > 1:
        yield "expert groups", f"{model.num_expert_groups}, {model.topk_group} of them for a token"
    yield "width of an expert; of a dense layer", f"{model.moe_intermediate_size:,}; {model.intermediate_size:,}"
    tied = hf_config(model)["tie_word_embeddings"]
    yield "vocabulary", f"{model.vocab_size:,}, embedding and head {'tied' if tied else 'apart'}"
    yield "context", f"{model.max_position_embeddings:,} tokens (RoPE, base {model.rope_theta:,.0f})"
    yield "stored as", "float32" if dtype == "float32" else f"{dtype}, router biases float32"


def _data(manifest: dict[str, Any] | None) -> str:
    if manifest is None:
        return "What it was trained on is not known to the writer of this card."
    rows = ["| source | licence | documents | bytes of text | tokens |", "|---|---|---:|---:|---:|"]
    for source in manifest["sources"]:
        counts = " | ".join(f"{source[key]:,}" for key in ("documents", "bytes", "tokens"))
        rows.append(f"| {_cell(_last(source['path']))} | {_cell(source['license'])} | {counts} |")
    train, held_out = manifest["splits"]["train"], manifest["splits"].get("validation")
    text = f"Trained on {train['tokens']:,} tokens of {_documents(train['documents'])}"
    if held_out:
        text += f"; {held_out['tokens']:,} tokens of {_documents(held_out['documents'])} were held out"
    return "\n".join(rows) + f"\n\n{text}. The tokenizer has {manifest['tokenizer']['num_ids']:,} ids."


def _training(run: Run, step: int, tokens: int, manifest: dict[str, Any] | None) -> Iterable[tuple[str, str]]:
    train, schedule, parallel = run.train, run.schedule, run.parallel
    length = run.data.sequence_length
    passes = f" ({tokens / manifest['splits']['train']['tokens']:.2g} passes over the data)" if manifest else ""
    yield "tokens seen", f"{tokens:,}{passes}"
    yield (
        "FLOPs",
        f"{tokens * train_flops_per_token(run.model, length):.3g} (6 for each token and activated parameter, and attention)",
    )
    yield "steps", f"{step:,} of {train.train_steps:,}"
    yield "batch", f"{train.global_batch_size:,} sequences of {length:,} tokens"
    optimizer = run.optimizer
    adamw = f"AdamW (betas {optimizer.adamw_beta1:g} and {optimizer.adamw_beta2:g}, epsilon {optimizer.adamw_eps:g})"
    if optimizer.name == "muon":
        nesterov = ", Nesterov" if optimizer.nesterov else ""
        one_matrix = ", attention split by head" if optimizer.matrices == "per_head" else ""
        yield (
            "optimizer",
            f"Muon on matrices (momentum {optimizer.momentum:g}{nesterov}, {optimizer.num_newton_schulz_steps} "
            f"Newton-Schulz steps with the {optimizer.coefficients} coefficients, update scaled by "
            f"{optimizer.rms_match:g} * sqrt(max(rows, columns)){one_matrix}); {adamw} on embedding, head and norms",
        )
    else:
        yield "optimizer", f"{adamw} on every parameter"
    yield "weight decay; gradient clipping", f"{optimizer.weight_decay:g}; {optimizer.clip_grad_norm:g}"
    if optimizer.qk_clip:
        yield "MuonClip", f"attention logits above {optimizer.qk_clip:g}"
    decay = "constant" if schedule.decay == "constant" else f"{schedule.decay} decay to {schedule.min_lr:g}"
    warmup = f"warm-up over {_steps(schedule.warmup_steps)} to " if schedule.warmup_steps else ""
    yield "learning rate", f"{warmup}{schedule.lr:g}, {decay}"
    yield (
        "balance of experts",
        f"router biases moved by {schedule.router_bias_update_rate:g} a step, sequence-wise auxiliary loss "
        f"{run.model.aux_loss_alpha:g}",
    )
    residual = ", float32 residual stream" if train.dtype == "bfloat16" and train.fp32_residual_connection else ""
    yield "precision", f"{train.dtype}{residual}, float32 master weights and gradient sums"
    sizes = {
        "tensor": parallel.tensor_parallel_size,
        "pipeline": parallel.pipeline_parallel_size,
        "expert": parallel.expert_parallel_size,
    }
    cut = ", ".join(f"{size}-way {name} parallelism" for name, size in sizes.items() if size > 1)
    yield "layout", f"{cut}, the rest data-parallel" if cut else "data-parallel only"
    yield "seed", str(train.seed)


def _results(
    entries: Sequence[dict[str, Any]], step: int, manifest: dict[str, Any] | None, curve: bool, averaged: bool
) -> list[str]:
    """Losses of the step itself and of the last validation, with what compressors make of the held-out text."""
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
        if split := (manifest or {"splits": {}})["splits"].get("validation"):
            for program in ("gzip", "xz"):
                bits = 8 * split[f"{program}_bytes"] / split["compressed_text_bytes"]
                rows[f"bits per byte by {program} -9"] = f"{bits:.3f}"
    text = [_table(rows.items())] if rows else ["No losses of this checkpoint are recorded."]
    if rows and averaged:
        text.append(f"These are losses of the weights after step {step:,}, before averaging.")
    return [*text, f"![Loss over tokens]({CURVE_FILE})"] if curve else text


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)])


def _cell(text: str) -> str:
    """Text that stays in its cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _last(path: str) -> str:
    """Last component of a path, so that nothing tells how a machine's folders are called."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "unnamed"


def _steps(count: int) -> str:
    return f"{count:,} step" if count == 1 else f"{count:,} steps"


def _documents(count: int) -> str:
    return f"{count:,} document" if count == 1 else f"{count:,} documents"


def _short(count: int) -> str:
    """A count of parameters for reading: 16.0 billion, 2.5 million."""
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:,}"
