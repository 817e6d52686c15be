"""Hugging Face folders of random models, written by transformers, for the tests of import."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.layouts import build, collect

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
    """Write a random model with nonzero router biases by `save_pretrained`."""
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
    """Return dtype, shape and bytes of every tensor; router biases as float32, their dtype in exports."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                tensor = handle.get_tensor(name)
                if name.endswith("e_score_correction_bias"):
                    tensor = tensor.float()
                raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                tensors[name] = (str(tensor.dtype), tuple(tensor.shape), raw)
    return tensors


def change_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json, and remove the keys whose value is `...`."""
    path = folder / "config.json"
    hf_config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in hf_config.items() if value is not ...}))


def change_tensors(folder: Path, change: Any) -> None:
    """Apply `change` to the dictionary of tensors in model.safetensors, and rewrite the file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def forward(config, tokens):
    """Return logits [batch, sequence, vocabulary], the experts that each router chose, and the weights.

    Router biases are nonzero.
    """
    from moonlight.train.forward_backward import find_routers

    (model,), _ = build(config)
    for router in find_routers([model]):
        generator = torch.Generator().manual_seed(router.layer_number)
        router.expert_bias.copy_(0.2 * torch.randn(router.expert_bias.shape, generator=generator))
    choices = []
    hooks = [
        router.register_forward_hook(lambda module, args, out: choices.append(out[1].numpy()))
        for router in find_routers([model])
    ]
    model.eval()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        logits = model(tokens, positions, None)
    for hook in hooks:
        hook.remove()
    return logits.numpy(), choices, collect([model])


def fuse_experts(state, model_config):
    """Return the state dict in transformers' in-memory form: the experts of a layer stacked, gate above up."""
    fused = {name: value for name, value in state.items() if ".mlp.experts." not in name}
    for layer in range(model_config.first_k_dense_replace, model_config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        stack = {
            kind: torch.stack(
                [state[f"{prefix}{expert}.{kind}_proj.weight"] for expert in range(model_config.num_experts)]
            )
            for kind in ("gate", "up", "down")
        }
        fused[f"{prefix}gate_up_proj"] = torch.cat([stack["gate"], stack["up"]], dim=1)
        fused[f"{prefix}down_proj"] = stack["down"]
    return fused
