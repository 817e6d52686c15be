"""Hugging Face folders of random models, made by transformers, for the tests of import."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.446,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 50000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_folder(path: Path, dtype: torch.dtype = torch.float32, max_shard_size: str = "50GB", **shape: Any) -> Path:
    """A random model with router biases that matter, as `save_pretrained` writes it."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**SHAPE | {"initializer_range": 0.08} | shape)).to(dtype)
    for layer in model.model.layers[model.config.first_k_dense_replace :]:
        layer.mlp.gate.e_score_correction_bias.data.normal_(0, 0.2)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return path


def raw_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor; router biases as float32, which is what exports hold."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                tensor = handle.get_tensor(name)
                if name.endswith("e_score_correction_bias"):
                    tensor = tensor.float()
                raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                found[name] = (str(tensor.dtype), tuple(tensor.shape), raw)
    return found


def change_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; what is set to `...` is removed."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_tensors(folder: Path, change: Any) -> None:
    """Rewrite model.safetensors after `change` was applied to the dictionary of its tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
