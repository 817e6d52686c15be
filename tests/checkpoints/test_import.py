"""Import and export preserve all bytes and logits under any layout."""

import json
import math
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.export import export
from checkpoints.hf_import import import_folder
from checkpoints.reader import open_checkpoint
from checkpoints.verify import verify
from moonlight.config.load import load_recipe
from moonlight.train.metrics import read_metrics
from tests.support.hugging_face import change_config, change_tensors, make_folder, raw_tensors
from tests.support.layouts import LAYOUTS, make_run, resave, train_run

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@st.composite
def shapes(draw):
    """Draw a DeepSeek-V3 shape: the settings that change the set of tensors, and odd sizes."""
    groups = draw(st.integers(1, 4))
    per_group = draw(st.integers(max(2, 4 // groups), 64 // groups))
    topk_group = draw(st.integers(1, groups))
    return {
        "q_lora_rank": draw(st.none() | st.integers(1, 24)),
        "n_group": groups,
        "topk_group": topk_group,
        "n_routed_experts": groups * per_group,
        "num_experts_per_tok": draw(st.integers(1, min(6, topk_group * per_group))),
        "n_shared_experts": draw(st.integers(1, 3)),
        "first_k_dense_replace": (dense := draw(st.integers(1, 3))),
        "num_hidden_layers": dense + draw(st.integers(1, 2)),
        "num_attention_heads": (heads := draw(st.integers(1, 5))),
        "num_key_value_heads": heads,
        "kv_lora_rank": draw(st.integers(1, 20)),
        "qk_nope_head_dim": draw(st.integers(1, 12)),
        "qk_rope_head_dim": 2 * draw(st.integers(1, 4)),
        "v_head_dim": draw(st.integers(1, 12)),
        "vocab_size": draw(st.integers(3, 120)),
        "intermediate_size": draw(st.integers(1, 70)),
        "moe_intermediate_size": draw(st.integers(1, 30)),
        "tie_word_embeddings": draw(st.booleans()),
    }


@settings(max_examples=30, deadline=None)
@given(
    shape=shapes(),
    dtype=st.sampled_from(list(NAMES)),
    shard=st.sampled_from(["20KB", "50GB"]),
    max_shard_bytes=st.sampled_from([10_000, 10**9]),
)
def test_import_then_export_gives_the_same_bytes(shape, dtype, shard, max_shard_bytes):
    with tempfile.TemporaryDirectory() as temporary:
        parent = Path(temporary)
        source = make_folder(parent / "hf", dtype, shard, **shape)
        assert import_folder(source, parent / "checkpoint")
        assert export(parent / "checkpoint", parent / "back", dtype=NAMES[dtype], max_shard_bytes=max_shard_bytes)
        assert raw_tensors(parent / "back") == raw_tensors(source)
        for file in (parent / "back").glob("*.safetensors"):
            header = json.loads(file.read_bytes()[8:].split(b"}}", 1)[0].decode().strip() + "}}")
            for name, entry in header.items():
                if name != "__metadata__":
                    width = 4 if entry["dtype"] == "F32" else 2
                    assert entry["data_offsets"][0] % width == 0
                    assert name.endswith("e_score_correction_bias") or entry["dtype"] == {4: "F32", 2: "BF16"}[width]


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """A model with expert groups and query compression, in bfloat16, and its checkpoint."""
    parent = tmp_path_factory.mktemp("grouped")
    shape = {"n_group": 4, "topk_group": 2, "n_routed_experts": 16, "num_experts_per_tok": 4, "q_lora_rank": 24}
    folder = make_folder(parent / "hf", torch.bfloat16, "40KB", **shape)
    import_folder(folder, parent / "checkpoint")
    return folder, parent / "checkpoint"


@pytest.mark.parametrize("layout", ["1", "TP2", "PP2", "EP2", "EP2xTP2"])
@pytest.mark.parametrize("tied", [False, True])
def test_same_bytes_after_a_save_under_any_layout(pool, tmp_path, tokenizer_folder, layout, tied):
    folder = make_folder(tmp_path / "hf", torch.bfloat16, vocab_size=1024, tie_word_embeddings=tied)
    import_folder(folder, tmp_path / "checkpoint")
    world_size, parallel = LAYOUTS[layout]
    pool.run(world_size, resave, tmp_path / "checkpoint", tmp_path / "runs", parallel, tokenizer_folder)
    export(tmp_path / "runs", tmp_path / "back", dtype="bfloat16")
    assert raw_tensors(tmp_path / "back") == raw_tensors(folder)


def test_logits_and_routes_equal_transformers(grouped):
    folder, checkpoint = grouped
    report = verify(checkpoint, folder)
    assert report.passed, report
    assert report.logit_difference <= 1e-4 < report.largest_logit
    assert not (folder / "verification.json").exists(), "verify must not write into a folder without checksums"


def test_logits_of_a_tied_model(tmp_path):
    folder = make_folder(tmp_path / "hf", tie_word_embeddings=True)
    import_folder(folder, tmp_path / "checkpoint")
    assert verify(tmp_path / "checkpoint", folder).passed
    export(tmp_path / "checkpoint", tmp_path / "back")
    assert verify(tmp_path / "checkpoint", tmp_path / "back").passed
    export(tmp_path / "checkpoint", tmp_path / "untied", untie=True)
    tensors = raw_tensors(tmp_path / "untied")
    assert tensors.pop("lm_head.weight") == tensors["model.embed_tokens.weight"]
    assert tensors == raw_tensors(tmp_path / "back")
    assert verify(tmp_path / "checkpoint", tmp_path / "untied").passed


def test_a_second_import_does_nothing(grouped, tmp_path):
    folder, checkpoint = grouped
    before = (checkpoint / "state.json").read_bytes()
    assert not import_folder(folder, checkpoint)
    assert (checkpoint / "state.json").read_bytes() == before


def test_float16_is_preserved_exactly(tmp_path):
    folder = make_folder(tmp_path / "hf", torch.float16)
    import_folder(folder, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "back")
    change_tensors(folder, lambda t: t.update({name: value.float() for name, value in t.items()}))
    assert raw_tensors(tmp_path / "back") == raw_tensors(folder)


@pytest.fixture(scope="module")
def released(tiktoken_folder, tmp_path_factory):
    """A small copy of the released Moonlight's files.

    It has remote code, stale tensors, bfloat16 router biases, and a tiktoken file with two more special ids than the
    embedding has rows.
    """
    from moonlight.data.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("released") / "Moonlight-tiny"
    tokenizer = Tokenizer.load(tiktoken_folder)
    make_folder(folder, torch.bfloat16, "100KB", vocab_size=tokenizer.num_ids - 2)
    for file in tiktoken_folder.iterdir():
        shutil.copy(file, folder)
    files = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stale = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(2) for layer in range(4)}
    from safetensors.torch import load_file, save_file

    save_file(load_file(files[0]) | stale, files[0], metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(stale, files[0].name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    code = f"open({str(folder.parent / 'code-was-run')!r}, 'w')\nclass DeepseekV3Config: pass\n"
    for name in ("configuration_deepseek.py", "modeling_deepseek.py", "tokenization_moonshot.py"):
        (folder / name).write_text(code)
    auto_map = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    change_config(folder, auto_map=auto_map, torch_dtype="bfloat16", dtype=..., rope_theta=50000.0, rope_parameters=...)
    (folder / "generation_config.json").write_text(
        json.dumps({"max_length": 64, "eos_token_id": [tokenizer.eos_id + 1]})
    )
    return folder


def test_the_released_file_set(released, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moonlight.data.tokenizer import Tokenizer

    import_folder(released, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "back", dtype="bfloat16")
    expected = {name: value for name, value in raw_tensors(released).items() if "inv_freq" not in name}
    assert raw_tensors(tmp_path / "back") == expected
    assert verify(tmp_path / "checkpoint", released).passed
    assert verify(tmp_path / "checkpoint", tmp_path / "back").passed
    assert not (released.parent / "code-was-run").exists()
    assert not list((tmp_path / "back").glob("*.py"))
    assert Tokenizer.load(tmp_path / "back").sha256 == Tokenizer.load(released).sha256
    eos_id = Tokenizer.load(released).eos_id
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"] == [eos_id + 1]
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == eos_id + 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "back", trust_remote_code=False)
    text = "def main():\n    return 42  # 月光"
    ids = AutoTokenizer.from_pretrained(tmp_path / "back", trust_remote_code=False)(text)["input_ids"]
    assert ids == Tokenizer.load(released).encode(text)


@pytest.mark.parametrize("layout", ["1", "EP2xPP2"])
def test_pretraining_starts_from_an_import(pool, tmp_path, tokenizer_folder, data_folder, layout):
    """The first loss of the run equals that of transformers on the same tokens."""
    from transformers import AutoModelForCausalLM

    from moonlight.data.loader import TrainDataset, collate

    folder = make_folder(tmp_path / "hf", vocab_size=1024)
    for file in tokenizer_folder.iterdir():
        if file.name != "manifest.json":
            shutil.copy(file, folder)
    import_folder(folder, tmp_path / "checkpoint")
    config = make_run(tmp_path / "runs", data_folder, tokenizer_folder, layout, train_steps=2, save_every_steps=2)
    model_config = open_checkpoint(tmp_path / "checkpoint").model_config
    config = replace(
        config, model=model_config, train=replace(config.train, initial_checkpoint=str(tmp_path / "checkpoint"))
    )
    pool.run(LAYOUTS[layout][0], train_run, config)
    losses = [entry["loss/train"] for entry in read_metrics(tmp_path / "runs" / layout)]

    samples = TrainDataset(data_folder, config.data.sequence_length, config.train.seed)
    tokens, labels, mask = collate([samples[index] for index in range(config.train.global_batch_size)])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    token_losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    expected = (token_losses * mask.flatten()).sum() / mask.sum()
    assert math.isclose(losses[0], expected.item(), rel_tol=1e-5)
    assert losses[1] != losses[0]

    export(tmp_path / "runs" / layout, tmp_path / "further", license="mit")
    card = (tmp_path / "further" / "README.md").read_text()
    assert "trained further for 2 steps" in card and "starting from the weights of `hf`" in card


def test_the_imported_recipe_can_be_a_base(tmp_path, tokenizer_folder):
    folder = make_folder(tmp_path / "hf", vocab_size=1024)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    import_folder(folder, tmp_path / "checkpoint")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "base: checkpoint/recipe.yaml\nname: mine\ndata: {path: data, sequence_length: 32}\nschedule: {lr: 1.0e-3}\n"
        "train: {train_steps: 5, global_batch_size: 8, micro_batch_size: 2}\n"
    )
    config = load_recipe(recipe)
    assert config.model == open_checkpoint(tmp_path / "checkpoint").model_config
    assert config.train.initial_checkpoint == str(tmp_path / "checkpoint")
    assert config.data.tokenizer == str(tmp_path / "checkpoint" / "tokenizer")
