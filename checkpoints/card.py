"""The model card of an exported folder: its README.md, with what is known of the run and nothing else."""

import re
from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from checkpoints.card_tables import (
    Manifests,
    architecture,
    format_steps,
    last_component,
    markdown_table,
    results,
    training,
    training_data,
)
from checkpoints.licenses import HUB_LICENSES, license_slug
from moonlight import __version__
from moonlight.config.model import ModelConfig
from moonlight.config.run import RunConfig
from moonlight.config.timeline import RunSchedule
from moonlight.plan.flops import count_parameters

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_PLACEHOLDERS = re.compile(r"\[(?i:more information needed)\]|\b(?:TODO|TBD|FIXME)\b|\{\{.*?\}\}")
_OWN_PATHS = re.compile(r"(?<![\w:/.])(?:/(?:home|root|Users|tmp|mnt|var|opt)/|[A-Z]:\\)[^\s`|)]*")

_NATIVE_MLA_WIDTH = 576
"""kv_lora_rank + qk_rope_head_dim that vLLM's kernels for latent attention know."""

_COMPLETE = """\
```python
from transformers import AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained("{name}", split_special_tokens=False)
complete = pipeline("text-generation", model="{name}", tokenizer=tokenizer)
prompt = tokenizer.eos_token + "The"  # in training, documents begin after an end-of-text token
print(complete(prompt, max_new_tokens=32, return_full_text=False)[0]["generated_text"])
```"""

_COMPLETE_IMPORTED = """\
```python
from transformers import pipeline

complete = pipeline("text-generation", model="{name}")
print(complete("The", max_new_tokens=32, return_full_text=False)[0]["generated_text"])
```"""

_CHAT = """\
```python
from transformers import AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained("{name}", split_special_tokens=False)
chat = pipeline("text-generation", model="{name}", tokenizer=tokenizer)
messages = [{{"role": "user", "content": "Who are you?"}}]
print(chat(messages, max_new_tokens=32)[0]["generated_text"][-1]["content"])
```"""

_SERVE = """\
```
{switch}vllm serve {name}
python -m sglang.launch_server --model-path {name}
```"""


def model_card(
    *,
    model_config: ModelConfig,
    name: str,
    step: int,
    dtype: str,
    license: str | None,
    chat: bool,
    config: RunConfig | None,
    consumed_tokens: int,
    metrics: Sequence[dict[str, Any]],
    manifests: Manifests | None,
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
        manifests: of the prepared data that it was trained on, by source.
        imported_from: Hub name (owner/name) of the model whose weights came first. Anything else counts as a path,
            of which only the last component is told.
        evaluation: Markdown with results of benchmarks.
        curve: whether the folder holds loss.png.
        averaged_steps: of the checkpoints whose mean the weights are; empty for a single checkpoint.
    """
    license = None if license is None or license.strip().lower() in ("", "unknown") else license.strip()
    at_step = [entry for entry in metrics if entry["step"] <= step]
    sections = [
        f"# {name}",
        _summary(model_config, config, step, consumed_tokens, chat, imported_from, averaged_steps),
        f"Licence: {license}." if license else "The licence of this model is not stated.",
        "## Use",
        _usage(model_config, name, chat=chat, trained=config is not None),
        "## Architecture",
        markdown_table(architecture(model_config, dtype)),
    ]
    if config is not None:
        sections += [
            "## Training data",
            training_data(config, consumed_tokens, manifests),
            "## Training",
            markdown_table(training(config, step, consumed_tokens, manifests)),
            "## Results",
            *results(at_step, step, manifests, curve, bool(averaged_steps), dtype),
        ]
    elif evaluation:
        sections.append("## Results")
    if evaluation:
        sections += ["### Evaluation", re.sub(r"(?m)^(#{1,3} )", r"###\1", evaluation.strip())]
    sections += [
        "## Limitations",
        _limitations(chat, config is not None),
        "## How it was made",
        _method(config, __version__),
    ]
    return (
        f"---\n{_front_matter(license, chat, model_config, config, imported_from)}\n---\n\n"
        + "\n\n".join(sections)
        + "\n"
    )


def missing_card_parts(text: str) -> list[str]:
    """What a release still lacks in the model card `text`, one phrase each; empty if it is complete."""
    if not REGEX_YAML_BLOCK.search(text):
        return ["front matter between two lines of ---"]
    try:
        card = ModelCard(text)
    except yaml.YAMLError:
        return ["front matter that is YAML"]
    except (TypeError, ValueError):
        return ["front matter of keys and values as the Hub knows them"]
    data, missing = card.data, []
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


def _front_matter(
    license: str | None, chat: bool, model_config: ModelConfig, config: RunConfig | None, imported_from: str | None
) -> str:
    slug = license_slug(license) if license else None
    is_id = slug in HUB_LICENSES
    muon = config is not None and config.optimizer.name == "muon"
    data = ModelCardData(
        license=slug if is_id else "other" if license else None,
        license_name=None if is_id else slug,
        base_model=imported_from if imported_from and _HUB_NAME.fullmatch(imported_from) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[
            "deepseek_v3",
            *["moe"] * model_config.has_experts,
            *["muon"] * muon,
            "moonlight-stack",
            *["conversational"] * chat,
        ],
    )
    return data.to_yaml()


def _limitations(chat: bool, trained: bool) -> str:
    text = "No test of safety, bias or truthfulness belongs to this card."
    if trained and not chat:
        text += " It was trained to continue text, not to follow instructions."
    return f"{text} The model can state falsehoods fluently and repeat what its training data contains."


def _summary(
    model_config: ModelConfig,
    config: RunConfig | None,
    step: int,
    tokens: int,
    chat: bool,
    imported_from: str | None,
    averaged_steps: Sequence[int],
) -> str:
    counts = count_parameters(model_config)
    kind = "mixture-of-experts" if model_config.has_experts else "dense"
    text = (
        f"A {kind} language model of the DeepSeek-V3 architecture with {_short(counts.total)} parameters, "
        f"of which {_short(counts.activated_with_head)} are activated for each token."
    )
    origin = imported_from and (
        f"[{imported_from}](https://huggingface.co/{imported_from})"
        if _HUB_NAME.fullmatch(imported_from)
        else f"`{last_component(imported_from)}`"
    )
    if config is None:
        return f"{text} Its weights were imported from {origin or 'another model'}; nothing was trained since then."
    kind = "trained further" if origin else "trained from random weights"
    text += f" It was {kind} for {format_steps(step)} on {tokens:,} tokens"
    text += f", beginning with the weights of {origin}." if origin else "."
    if chat:
        text += " It is set up for conversations: it is asked through its chat template, and a message ends its text."
    if averaged_steps:
        averaged = ", ".join(f"{number:,}" for number in averaged_steps)
        text += f" Its weights are the mean of the checkpoints after steps {averaged}."
    if step < (planned := RunSchedule(config).num_steps):
        text += f" The run was planned for {planned:,} steps: this is a checkpoint on the way."
    return text


def _usage(model_config: ModelConfig, name: str, *, chat: bool, trained: bool) -> str:
    """Snippets for transformers and two servers; `trained`: by this project, with a tokenizer of its own."""
    snippet = _CHAT if chat else _COMPLETE if trained else _COMPLETE_IMPORTED
    native = model_config.kv_lora_rank + model_config.qk_rope_head_dim == _NATIVE_MLA_WIDTH
    place = "its name on the Hub" if _HUB_NAME.fullmatch(name) else "to be replaced by the path of this folder"
    text = [
        f"With transformers, without remote code (`{name}` is {place}):",
        snippet.format(name=name),
        "Served over an OpenAI-compatible API by vLLM or SGLang:",
        _SERVE.format(name=name, switch="" if native else "VLLM_MLA_DISABLE=1 "),
    ]
    if not native:
        text.append(
            f"The switch is for vLLM's latent attention kernels, which want kv_lora_rank + qk_rope_head_dim = "
            f"{_NATIVE_MLA_WIDTH}; here it is {model_config.kv_lora_rank + model_config.qk_rope_head_dim}."
        )
    return "\n\n".join(text)


def _method(config: RunConfig | None, version: str) -> str:
    """Tools and papers."""
    papers = ["The architecture is that of [DeepSeek-V3](https://arxiv.org/abs/2412.19437)"]
    if config is None:
        made = "Exported with Moonlight stack {version}, which wrote this card from the model's configuration."
    else:
        made = "Trained and exported with Moonlight stack {version}, which wrote this card from records of the run."
        if config.optimizer.name == "muon":
            papers.append("the optimizer that of [Moonlight](https://arxiv.org/abs/2502.16982)")
        if config.optimizer.qk_clip:
            papers.append("MuonClip that of [Kimi K2](https://arxiv.org/abs/2507.20534)")
    return f"{made.format(version=version)} {', '.join(papers)}."


def _short(count: int) -> str:
    """A count of parameters for reading: 16.0 billion, 2.5 million."""
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:,}"
