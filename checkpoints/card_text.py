"""The longer texts of a model card: how to use the model, and how it was made."""

from moonlight.config import Run
from moonlight.config_model import Model

NATIVE_MLA_WIDTH = 576
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


def usage(model: Model, name: str, *, chat: bool, trained: bool) -> str:
    """Snippets for transformers and two servers; `trained`: by this project, with a tokenizer of its own."""
    snippet = _CHAT if chat else _COMPLETE if trained else _COMPLETE_IMPORTED
    native = model.kv_lora_rank + model.qk_rope_head_dim == NATIVE_MLA_WIDTH
    text = [
        f"With transformers, without remote code (`{name}` is the folder of this file, or its name on the Hub):",
        snippet.format(name=name),
        "Served over an OpenAI-compatible API by vLLM or SGLang:",
        _SERVE.format(name=name, switch="" if native else "VLLM_MLA_DISABLE=1 "),
    ]
    if not native:
        text.append(
            f"The switch is for vLLM's latent attention kernels, which want kv_lora_rank + qk_rope_head_dim = "
            f"{NATIVE_MLA_WIDTH}; here it is {model.kv_lora_rank + model.qk_rope_head_dim}."
        )
    return "\n\n".join(text)


def method(run: Run | None, version: str) -> str:
    """Tools and papers."""
    papers = ["The architecture is that of [DeepSeek-V3](https://arxiv.org/abs/2412.19437)"]
    if run is None:
        verb = "Exported"
    else:
        verb = "Trained and exported"
        if run.optimizer.name == "muon":
            papers.append("the optimizer that of [Moonlight](https://arxiv.org/abs/2502.16982)")
        if run.optimizer.qk_clip:
            papers.append("MuonClip that of [Kimi K2](https://arxiv.org/abs/2507.20534)")
    return (
        f"{verb} with Moonlight stack {version}, which wrote this card from the recipe, the metrics and the manifest "
        f"of the data. {', '.join(papers)}."
    )
