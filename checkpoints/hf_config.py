"""Conversion of the model configuration to and from `config.json`, and `generation_config.json` of an export."""

import re
from pathlib import Path
from typing import Any

from moonlight.config.load import parse_model_config
from moonlight.config.model import ModelConfig
from moonlight.errors import UserError

CONFIG_FILE = "config.json"


def hf_config(
    model_config: ModelConfig, *, dtype: str = "float32", bos_id: int | None = None, eos_id: int | None = None
) -> dict[str, Any]:
    """Return config.json as a DeepSeek-V3 configuration that transformers, vLLM and SGLang read without remote code.

    `save_pretrained` of transformers 5 cannot write it: it drops `topk_method`, `scoring_func` and `moe_layer_freq`,
    without which the servers fail or silently score by softmax, and it adds a prediction layer. `head_dim` is absent:
    transformers must derive it from `qk_rope_head_dim`.
    """
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": model_config.vocab_size,
        "hidden_size": model_config.hidden_size,
        "num_hidden_layers": model_config.num_hidden_layers,
        "num_attention_heads": model_config.num_attention_heads,
        "num_key_value_heads": model_config.num_attention_heads,
        "q_lora_rank": model_config.q_lora_rank,
        "kv_lora_rank": model_config.kv_lora_rank,
        "qk_nope_head_dim": model_config.qk_nope_head_dim,
        "qk_rope_head_dim": model_config.qk_rope_head_dim,
        "v_head_dim": model_config.v_head_dim,
        "intermediate_size": model_config.intermediate_size,
        "moe_intermediate_size": model_config.moe_intermediate_size,
        "n_routed_experts": model_config.num_experts,
        "num_experts_per_tok": model_config.num_experts_per_tok,
        "n_shared_experts": model_config.num_shared_experts,
        "first_k_dense_replace": model_config.first_k_dense_replace,
        "moe_layer_freq": 1,
        "n_group": model_config.num_expert_groups,
        "topk_group": model_config.topk_group,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": model_config.routed_scaling_factor,
        "aux_loss_alpha": model_config.aux_loss_alpha,
        "seq_aux": True,
        "num_nextn_predict_layers": 0,
        "ep_size": 1,
        "pretraining_tp": 1,
        "hidden_act": "silu",
        "rms_norm_eps": model_config.rms_norm_eps,
        "rope_theta": model_config.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": model_config.max_position_embeddings,
        "initializer_range": model_config.initializer_range,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model_config.tie_word_embeddings,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
    }


def generation_config(model_config: ModelConfig, *, bos_id: int | None, eos_ids: list[int]) -> dict[str, Any]:
    """Return generation_config.json: greedy, stop at any of `eos_ids`, at most the trained context."""
    return {
        "bos_token_id": bos_id,
        "eos_token_id": eos_ids,
        "max_length": model_config.max_position_embeddings,
        "do_sample": False,
    }


SUPPORTED_VALUES = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "moe_layer_freq": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "rope_interleave": True,
    "rope_scaling": None,
}
"""The only supported value of each DeepSeek-V3 setting that the model cannot vary; each key may be absent."""

_SAME_NAMES = """
    vocab_size hidden_size num_hidden_layers num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim
    qk_rope_head_dim v_head_dim intermediate_size moe_intermediate_size num_experts_per_tok first_k_dense_replace
    topk_group routed_scaling_factor rms_norm_eps max_position_embeddings
"""
HF_NAMES = {name: name for name in _SAME_NAMES.split()} | {
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "num_expert_groups": "n_group",
}
"""Field of `ModelConfig` -> required key of config.json."""

OPTIONAL_FIELDS = ("aux_loss_alpha", "initializer_range", "tie_word_embeddings")
"""Fields with the same name in both; `ModelConfig` has a default."""

TRAINING_FIELDS = ("aux_loss_alpha", "initializer_range")
"""Fields of `ModelConfig` that do not affect inference."""


def model_config_from_hf(hf_config: dict[str, Any], path: Path) -> ModelConfig:
    """Return the model configuration of a Hugging Face config.json; ignore `auto_map` and its code.

    Args:
        path: path of the config.json, for messages.

    Raises:
        UserError: the architecture or a setting is not supported, or a setting is missing or invalid.
    """
    kind, classes = hf_config.get("model_type"), hf_config.get("architectures")
    if kind != "deepseek_v3" or classes not in (None, ["DeepseekV3ForCausalLM"]):
        raise UserError(
            f"{path} declares model_type {kind!r} with architectures {classes!r}: accepted is 'deepseek_v3' with "
            "['DeepseekV3ForCausalLM']"
        )
    for key, value in SUPPORTED_VALUES.items():
        if hf_config.get(key, value) != value:
            raise UserError(f"{path}: {key} is {hf_config[key]!r}: only {value!r} is supported")
    if hf_config.get("quantization_config") is not None:
        raise UserError(f"{path} has a quantization_config: only weights that are not quantized can be trained")
    tree = {}
    for name, key in HF_NAMES.items():
        if key not in hf_config:
            raise UserError(f"{path} lacks {key}, which is required")
        tree[name] = hf_config[key]
    tree |= {name: hf_config[name] for name in OPTIONAL_FIELDS if hf_config.get(name) is not None}
    tree["rope_theta"] = _rope_theta(hf_config, path)
    for name, value in tree.items():
        if isinstance(value, str):  # a recipe may give a number as a string, because YAML 1.1 has no 1e-5
            raise UserError(f"{path}: {HF_NAMES.get(name, name)} is {value[:100]!r}: a number is expected")
    try:
        model_config = parse_model_config(tree)
    except UserError as error:
        message = re.sub(r"model\.(\w+)", lambda match: HF_NAMES.get(match[1], match[1]), str(error))
        raise UserError(f"{path} cannot be used: {message}") from None
    heads = hf_config.get("num_key_value_heads", model_config.num_attention_heads)
    if heads != model_config.num_attention_heads:
        raise UserError(f"{path}: num_key_value_heads is {heads}: it must equal num_attention_heads")
    return model_config


def _rope_theta(hf_config: dict[str, Any], path: Path) -> float:
    """Return `rope_theta` from its key, or from `rope_parameters`, as transformers 5 writes it."""
    parameters, theta = hf_config.get("rope_parameters"), hf_config.get("rope_theta")
    if parameters is not None:
        is_plain = isinstance(parameters, dict) and parameters.keys() <= {"rope_theta", "rope_type", "type"}
        if not is_plain or not all(parameters.get(key, "default") == "default" for key in ("rope_type", "type")):
            raise UserError(
                f"{path}: rope_parameters is {parameters!r}: only rope_type 'default' with a rope_theta is supported"
            )
        nested = parameters.get("rope_theta")
        if nested is not None and theta is not None and nested != theta:
            raise UserError(f"{path}: rope_theta is {theta!r}, and {nested!r} in rope_parameters: they must be equal")
        theta = theta if nested is None else nested
    if theta is None:
        raise UserError(f"{path} lacks rope_theta")
    return theta
