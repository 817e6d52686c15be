"""Model card of an exported folder: its README.md, from the records of the run."""

import re
from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from checkpoints.card_tables import (
    Manifests,
    architecture,
    format_count,
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
"""Text that marks a card as unfinished: `moonlight release` refuses such a card."""
_LOCAL_PATHS = re.compile(r"(?<![\w:/.])(?:/(?:home|root|Users|tmp|mnt|var|opt)/|[A-Z]:\\)[^\s`|)]*")

_NATIVE_MLA_WIDTH = 576
"""The only value of kv_lora_rank + qk_rope_head_dim that the latent attention kernels of vLLM support."""

_COMPLETE = """\
```python
from transformers import AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained("{name}", split_special_tokens=False)
complete = pipeline("text-generation", model="{name}", tokenizer=tokenizer)
prompt = tokenizer.eos_token + "The"  # training documents follow an end-of-text token
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
    """Return the README.md of an exported Hugging Face folder. Omit what is None or empty, or state it as unknown.

    Args:
        name: title, and name of the model in the examples: its name on the Hub, or the name of the run.
        step: step of the checkpoint, or of the last checkpoint if several were averaged.
        dtype: dtype of the exported weights.
        license: license identifier of the Hub (apache-2.0), or a custom name.
        chat: True for a model that was trained on conversations and has a chat template.
        config: the recipe that trained the model; None for an imported model that was not trained further.
        metrics: objects of metrics.jsonl; steps after `step` are ignored.
        manifests: manifests of the training data, by source.
        imported_from: Hub name (owner/name) of the model that gave the initial weights. Any other text is a path, of
            which the card shows only the last component.
        evaluation: benchmark results as Markdown.
        curve: True if the folder has loss.png.
        averaged_steps: steps of the averaged checkpoints; empty for a single checkpoint.
    """
    license = None if license is None or license.strip().lower() in ("", "unknown") else license.strip()
    at_step = [entry for entry in metrics if entry["step"] <= step]
    sections = [
        f"# {name}",
        _summary(model_config, config, step, consumed_tokens, chat, imported_from, averaged_steps),
        f"License: {license}." if license else "The license of this model is not stated.",
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
    untuned = " The model was trained to continue text, not to follow instructions." * (config is not None and not chat)
    sections += [
        "## Limitations",
        f"This card reports no evaluation of safety, bias or truthfulness.{untuned} The model can produce false "
        "statements, and it can repeat its training data.",
        "## How it was made",
        _method(config),
    ]
    front_matter = _front_matter(license, chat, model_config, config, imported_from)
    return "\n\n".join([f"---\n{front_matter}\n---", *sections]) + "\n"


def missing_card_parts(text: str) -> list[str]:
    """Return what the model card `text` lacks for a release, one phrase per item; empty if it is complete."""
    if not REGEX_YAML_BLOCK.search(text):
        return ["front matter between two lines of ---"]
    try:
        card = ModelCard(text)
    except yaml.YAMLError:
        return ["front matter that is YAML"]
    except (TypeError, ValueError):
        return ["front matter with keys and values that the Hub accepts"]
    data, missing = card.data, []
    license = str(data.get("license", "")).strip().lower()
    if license in ("", "none", "unknown"):
        missing.append("a license")
    elif license == "other" and not data.get("license_name"):
        missing.append("the name of its license (license_name)")
    if not card.text.strip():
        missing.append("text below its front matter")
    missing += [f"text for the placeholder {match}" for match in dict.fromkeys(_PLACEHOLDERS.findall(text))]
    missing += [f"a public name instead of {match}" for match in dict.fromkeys(_LOCAL_PATHS.findall(text))]
    return missing


def _front_matter(
    license: str | None, chat: bool, model_config: ModelConfig, config: RunConfig | None, imported_from: str | None
) -> str:
    slug = license_slug(license) if license else None
    is_id = slug in HUB_LICENSES
    muon = config is not None and config.optimizer.name == "muon"
    tags = {"deepseek_v3": True, "moe": model_config.has_experts, "muon": muon}
    tags |= {"moonlight-stack": True, "conversational": chat}
    data = ModelCardData(
        license=slug if is_id else "other" if license else None,
        license_name=None if is_id else slug,
        base_model=imported_from if imported_from and _HUB_NAME.fullmatch(imported_from) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[tag for tag, applies in tags.items() if applies],
    )
    return data.to_yaml()


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
    source = imported_from and (
        f"[{imported_from}](https://huggingface.co/{imported_from})"
        if _HUB_NAME.fullmatch(imported_from)
        else f"`{last_component(imported_from)}`"
    )
    if config is None:
        return f"{text} Its weights were imported from {source or 'another model'} and were not trained further."
    kind = "trained further" if source else "trained from random initialization"
    text += f" It was {kind} for {format_count(step, 'step')} on {tokens:,} tokens"
    text += f", starting from the weights of {source}." if source else "."
    if chat:
        text += " It is a chat model: use its chat template; generation stops at the end of a message."
    if averaged_steps:
        averaged = ", ".join(f"{averaged_step:,}" for averaged_step in averaged_steps)
        text += f" Its weights are the mean of the checkpoints after steps {averaged}."
    if step < (planned := RunSchedule(config).num_steps):
        text += f" The run was planned for {planned:,} steps: this is an intermediate checkpoint."
    return text


def _usage(model_config: ModelConfig, name: str, *, chat: bool, trained: bool) -> str:
    """Return examples for transformers, vLLM and SGLang; `trained` is False for an imported model."""
    snippet = _CHAT if chat else _COMPLETE if trained else _COMPLETE_IMPORTED
    width = model_config.kv_lora_rank + model_config.qk_rope_head_dim
    is_native = width == _NATIVE_MLA_WIDTH
    hint = "" if _HUB_NAME.fullmatch(name) else f" Replace `{name}` with the path of this folder."
    text = [
        f"With transformers; no remote code is needed.{hint}",
        snippet.format(name=name),
        "To serve an OpenAI-compatible API with vLLM or SGLang:",
        _SERVE.format(name=name, switch="" if is_native else "VLLM_MLA_DISABLE=1 "),
    ]
    if not is_native:
        text.append(
            "`VLLM_MLA_DISABLE=1` turns off the latent attention kernels of vLLM. They require kv_lora_rank + "
            f"qk_rope_head_dim = {_NATIVE_MLA_WIDTH}; this model has {width}."
        )
    return "\n\n".join(text)


def _method(config: RunConfig | None) -> str:
    """Return the tools that made the model, and the papers it follows."""
    papers = "The architecture follows [DeepSeek-V3](https://arxiv.org/abs/2412.19437)"
    if config is None:
        made = f"Moonlight stack {__version__} exported the model and wrote this card from its configuration."
        return f"{made} {papers}."
    muon = ", the optimizer follows [Moonlight](https://arxiv.org/abs/2502.16982)" * (config.optimizer.name == "muon")
    qk_clip = ", MuonClip follows [Kimi K2](https://arxiv.org/abs/2507.20534)" * bool(config.optimizer.qk_clip)
    return (
        f"The model was trained with Moonlight stack. Version {__version__} exported it and wrote this card from the "
        f"records of the run. {papers}{muon}{qk_clip}."
    )


def _short(count: int) -> str:
    """Return a number of parameters in words, such as 16.0 billion or 2.5 million."""
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:,}"
