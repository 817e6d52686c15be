"""The `config.json` and `generation_config.json` of an exported model."""

from typing import Any

from moonlight.config import Model


def hf_config(
    model: Model, *, dtype: str = "float32", bos_id: int | None = None, eos_id: int | None = None
) -> dict[str, Any]:
    """A native DeepSeek-V3 configuration that transformers, vLLM and SGLang read without remote code.

    Written by hand because `save_pretrained` of transformers 5 drops `topk_method`, `scoring_func` and
    `moe_layer_freq`, without which the servers fail or silently score by softmax, and invents a prediction layer.
    `head_dim` is left out: transformers must derive it from `qk_rope_head_dim`.
    """
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_attention_heads,
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_nope_head_dim": model.qk_nope_head_dim,
        "qk_rope_head_dim": model.qk_rope_head_dim,
        "v_head_dim": model.v_head_dim,
        "intermediate_size": model.intermediate_size,
        "moe_intermediate_size": model.moe_intermediate_size,
        "n_routed_experts": model.num_experts,
        "num_experts_per_tok": model.num_experts_per_tok,
        "n_shared_experts": model.num_shared_experts,
        "first_k_dense_replace": model.first_k_dense_replace,
        "moe_layer_freq": 1,
        "n_group": model.num_expert_groups,
        "topk_group": model.topk_group,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": model.routed_scaling_factor,
        "aux_loss_alpha": model.aux_loss_alpha,
        "seq_aux": True,
        "num_nextn_predict_layers": 0,
        "ep_size": 1,
        "pretraining_tp": 1,
        "hidden_act": "silu",
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.initializer_range,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
    }


def generation_config(model: Model, *, bos_id: int, eos_ids: list[int]) -> dict[str, Any]:
    """Defaults for generation: stop at any of `eos_ids`, within the trained context."""
    return {
        "bos_token_id": bos_id,
        "eos_token_id": eos_ids,
        "max_length": model.max_position_embeddings,
        "do_sample": False,
    }
