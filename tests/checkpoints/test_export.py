"""Export and verification: every tensor, in one process; verification detects a single changed value."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoints.export import export
from checkpoints.hf_folder import open_folder
from checkpoints.reader import open_checkpoint
from checkpoints.verify import compare_tensors, verify
from moonlight.dist_checkpoint import hf_mapping
from moonlight.errors import UserError
from moonlight.files import sha256_checksum
from tests.support.layouts import make_run, train_run


@pytest.fixture(scope="module")
def config(pool, data_folder, tokenizer_folder, tmp_path_factory):
    """The config of a finished run of two processes, with query compression and expert groups."""
    config = make_run(tmp_path_factory.mktemp("runs"), data_folder, tokenizer_folder, "EP2", train_steps=4)
    model_config = replace(config.model, q_lora_rank=24, num_expert_groups=4, topk_group=2)
    config = replace(config, model=model_config)
    pool.run(2, train_run, config)
    return config


@pytest.fixture(scope="module")
def folder(config):
    return Path(config.runs_folder) / config.name


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def exported(request, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("hf") / request.param
    export(folder, out, dtype=request.param, max_shard_bytes=40_000)
    return out


def load_tensors(folder):
    """Return the tensors of all safetensors files in a folder by name."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_every_tensor_once_with_the_right_dtype(config, folder, exported):
    dtype = getattr(torch, exported.name)
    checkpoint = open_checkpoint(folder)
    tensors = load_tensors(exported)
    names = [part.name for row in hf_mapping.tensor_mappings(config.model) for part in row.hf_tensors]
    assert sorted(tensors) == sorted(names)
    for row in hf_mapping.tensor_mappings(config.model):
        full = checkpoint.read(row.key)
        for part in row.hf_tensors:
            value = full[part.index]
            expected = value if part.init_kind == "bias" else value.to(dtype)
            assert tensors[part.name].dtype == expected.dtype
            assert torch.equal(tensors[part.name], expected), part.name
            assert tuple(tensors[part.name].shape) == part.shape
    assert any(tensors[name].abs().max() > 0 for name in names if name.endswith("e_score_correction_bias"))


def test_shards_are_bounded_and_indexed(exported):
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    files = sorted(exported.glob("*.safetensors"))
    assert len(files) > 3
    assert [file.name for file in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    total = 0
    for file in files:
        with safe_open(file, framework="pt") as handle:
            sizes = [handle.get_tensor(name).nbytes for name in handle.keys()]  # noqa: SIM118
            assert {index["weight_map"][name] for name in handle.keys()} == {file.name}  # noqa: SIM118
        assert sum(sizes) <= 40_000 or len(sizes) == 1
        total += sum(sizes)
    assert index["metadata"]["total_size"] == total


def test_config_has_the_keys_that_servers_need(exported, config):
    hf_config = json.loads((exported / "config.json").read_text())
    assert hf_config["architectures"] == ["DeepseekV3ForCausalLM"]
    needed = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "num_nextn_predict_layers": 0}
    assert {key: hf_config[key] for key in needed} == needed
    assert "auto_map" not in hf_config and "head_dim" not in hf_config
    assert hf_config["torch_dtype"] == exported.name


def test_verify_passes_on_the_export(folder, exported):
    report = verify(folder, exported)
    assert report.passed, report
    assert report.tensors == len(load_tensors(exported))
    assert report.logit_difference <= 1e-4 < report.largest_logit
    assert report.tokens > 0


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda t: t["model.layers.1.mlp.experts.3.up_proj.weight"].view(-1)[5].add_(0.01), "differs in 1 of"),
        (lambda t: t.pop("model.layers.2.mlp.gate.e_score_correction_bias"), "is missing"),
        (lambda t: t.update({"model.layers.9.x": torch.zeros(1)}), "is not a tensor of the checkpoint"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].half()}), "expected one dtype"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:7].clone()}), "has shape"),
    ],
)
def test_verify_detects_any_difference(folder, tmp_path, damage, complaint):
    out = tmp_path / "hf"
    export(folder, out)
    file = out / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, out / "model.safetensors")
    for name in (file.name, "model.safetensors.index.json", "SHA256SUMS"):
        (out / name).unlink()
    checkpoint = open_checkpoint(folder)
    _, problems = compare_tensors(checkpoint, checkpoint.model_config, open_folder(out))
    assert len(problems) == 1 and complaint in problems[0]
    assert not verify(folder, out).passed


def test_verify_detects_any_changed_file(folder, tmp_path):
    out = tmp_path / "hf"
    export(folder, out)
    assert verify(folder, out).passed
    proof = json.loads((out / "verification.json").read_text())
    assert proof["passed"] and proof["sums_sha256"] == sha256_checksum(out / "SHA256SUMS")
    (out / "generation_config.json").write_text("{}")
    report = verify(folder, out)
    assert not report.passed and "generation_config.json" in report.problems[0]


def test_the_same_export_is_skipped_and_a_different_one_refused(folder, tmp_path):
    out = tmp_path / "hf"
    assert export(folder, out)
    assert not export(folder, out)
    with pytest.raises(UserError, match="different content"):
        export(folder, out, dtype="bfloat16")
    (out / "config.json").write_text("{}")
    with pytest.raises(UserError, match="different content"):
        export(folder, out)


def test_export_needs_neither_megatron_nor_a_process_group(folder, tmp_path):
    script = (
        "import sys; from pathlib import Path; from checkpoints.export import export; import torch.distributed as d; "
        "export(Path(sys.argv[1]), Path(sys.argv[2])); "
        "assert 'megatron' not in sys.modules and not d.is_initialized()"
    )
    command = [sys.executable, "-c", script, str(folder), str(tmp_path / "hf")]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_generation_is_the_argmax_chain_of_the_exported_model(folder, tmp_path):
    """The completion, generated with a KV cache, equals one full forward pass per token, without remote code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from eval.generate import generate

    out = tmp_path / "hf"
    export(folder, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    prompt = "import os\n"
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert generate(out, prompt, 6) == tokenizer.decode(ids[0, 1:], skip_special_tokens=True)
