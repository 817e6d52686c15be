"""Importing a folder with a bad config.json gives one line, exit code 2 and no files."""

import pytest

from tests.support.hugging_face import change_config


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_hidden_layers": 3}, "lacks the tensor model.layers.2.input_layernorm.weight, which {config} requires"),
        (
            {"num_hidden_layers": 9},
            "{config} requires 192 tensors of experts (num_hidden_layers 9, n_routed_experts 8)",
        ),
        ({"num_hidden_layers": 2**31 - 1}, "tensors of experts (num_hidden_layers 2147483647, n_routed_experts 8)"),
        ({"n_routed_experts": 2**31 - 1}, "tensors of experts (num_hidden_layers 2, n_routed_experts 2147483647)"),
        ({"hidden_size": 64}, "has shape (96, 32), {config} requires (96, 64)"),
        ({"moe_intermediate_size": 25}, "{config} requires (25, 32)"),
        ({"vocab_size": 97}, "has shape (96, 32), {config} requires (97, 32)"),
        ({"q_lora_rank": 8}, "lacks the tensor model.layers.0.self_attn.q_a_proj.weight, which {config} requires"),
        ({"tie_word_embeddings": True}, "lm_head.weight is not a tensor of the model in {config}"),
        ({"hidden_size": ...}, "{config} lacks hidden_size, which is required"),
        ({"hidden_size": "2048"}, "{config}: hidden_size is '2048': a number is expected"),
        ({"rms_norm_eps": "1e-5"}, "{config}: rms_norm_eps is '1e-5': a number is expected"),
        ({"hidden_size": None}, "{config} cannot be used: hidden_size is None: expected int"),
        ({"hidden_size": -1}, "{config} cannot be used: hidden_size is -1: it must be greater than 0"),
        ({"hidden_size": 0}, "{config} cannot be used: hidden_size is 0: it must be greater than 0"),
        ({"hidden_size": 32.0}, "{config} cannot be used: hidden_size is 32.0: expected int"),
        ({"hidden_size": True}, "{config} cannot be used: hidden_size is True: expected int"),
        ({"hidden_size": [32]}, "{config} cannot be used: hidden_size is [32]: expected int"),
        ({"hidden_size": 2**70}, f"hidden_size is {2**70}: at most 2147483647 is accepted"),
        ({"hidden_size": float("inf")}, "hidden_size is inf: a finite number is expected"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor is nan: a finite number is expected"),
        ({"n_group": None}, "{config} cannot be used: n_group is None: expected int"),
        ({"n_group": 3}, "n_routed_experts is 8: it must be a multiple of n_group (3)"),
        ({"topk_group": 2}, "topk_group is 2: it must be at most n_group (1)"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim is 3: it must be even"),
        ({"num_key_value_heads": 2}, "{config}: num_key_value_heads is 2: it must equal num_attention_heads"),
        ({"architectures": ["LlamaForCausalLM"]}, "with architectures ['LlamaForCausalLM']: accepted is 'deepseek_v3'"),
        ({"model_type": "llama"}, "{config} declares model_type 'llama' with architectures"),
        ({"model_type": ...}, "{config} declares model_type None with architectures"),
        ({"rope_scaling": {"type": "yarn", "factor": 40}}, "only None is supported"),
        ({"rope_scaling": {"type": "default"}}, "{config}: rope_scaling is {{'type': 'default'}}: only None is"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4, "factor": 40}}, "only rope_type 'default'"),
        ({"rope_parameters": {"type": "yarn", "rope_theta": 5e4}}, "only rope_type 'default' with a rope_theta"),
        ({"rope_parameters": {"rope_type": ["default"], "rope_theta": 5e4}}, "only rope_type 'default'"),
        ({"rope_parameters": "default"}, "only rope_type 'default' with a rope_theta is supported"),
        ({"rope_parameters": ...}, "{config} lacks rope_theta"),
        ({"rope_theta": 1e4}, "{config}: rope_theta is 10000.0, and 50000.0 in rope_parameters: they must be equal"),
        ({"quantization_config": {"quant_method": "fp8"}}, "{config} has a quantization_config: only weights"),
        ({"scoring_func": "softmax"}, "{config}: scoring_func is 'softmax': only 'sigmoid' is supported"),
        ({"norm_topk_prob": False}, "{config}: norm_topk_prob is False: only True is supported"),
        ({"attention_bias": True}, "{config}: attention_bias is True: only False is supported"),
        ({"moe_layer_freq": 2}, "{config}: moe_layer_freq is 2: only 1 is supported"),
        ({"hidden_act": "gelu"}, "{config}: hidden_act is 'gelu': only 'silu' is supported"),
    ],
)
def test_config(single_file, import_refused, changes, words):
    change_config(single_file, **changes)
    import_refused(single_file, words.format(config=single_file / "config.json"))


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "is not a Hugging Face folder: it has no config.json"),
        (b"", "config.json is corrupt: it is not a JSON object"),
        (b"[1]", "config.json is corrupt: it is not a JSON object"),
        (b"\xff\xfe", "config.json is corrupt: it is not a JSON object"),
        (b"{" * 9000, "config.json is corrupt: it is not a JSON object"),
        (b'{"a": ' + b"[" * 99_999 + b"]" * 99_999 + b"}", "config.json is corrupt: it is not a JSON object"),
        (b'{"hidden_size": ' + b"9" * 9999 + b"}", "config.json is corrupt: it is not a JSON object"),
        (b'{"hidden_size": 32, "hidden_size": 64}', "config.json is corrupt: it has the key 'hidden_size' twice"),
    ],
)
def test_config_file(single_file, import_refused, content, words):
    (single_file / "config.json").unlink()
    if content is not None:
        (single_file / "config.json").write_bytes(content)
    import_refused(single_file, str(single_file), words)
