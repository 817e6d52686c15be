"""Model card: its values are the run's, its front matter is valid on the Hub, and its snippets run."""

import json
import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from checkpoints.card import missing_card_parts, model_card
from checkpoints.export import _first_weights, export
from moonlight.config.load import load_recipe
from moonlight.plan.flops import count_parameters, train_flops_per_token
from moonlight.train.metrics import read_metrics


@pytest.fixture(scope="module")
def card_args(tiny_run):
    """Arguments of `model_card` for the finished tiny run."""
    config = load_recipe(tiny_run.recipe)
    metrics = read_metrics(tiny_run.folder)
    return {
        "model_config": config.model,
        "name": "someone/tiny",
        "step": 4,
        "dtype": "bfloat16",
        "license": "Apache-2.0",
        "chat": False,
        "config": config,
        "consumed_tokens": metrics[-1]["consumed_tokens"],
        "metrics": metrics,
        "manifests": {"data": json.loads((tiny_run.data / "manifest.json").read_text())},
        "imported_from": None,
        "evaluation": None,
        "curve": True,
    }


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("card") / "hf"
    export(tiny_run.folder, out)
    return out


def rows(text):
    """Return name -> value of every row of two-column tables."""
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE))


def test_card_values_are_those_of_the_run(card_args):
    config, last, manifest = (card_args["config"], card_args["metrics"][-1], card_args["manifests"]["data"])
    text = model_card(**card_args)
    values = rows(text)
    assert values["parameters"] == f"{count_parameters(config.model).total:,}"
    assert values["held-out loss"] == f"{last['loss/held_out']:.4f} nats per token"
    assert values["bits per byte of the held-out text"] == f"{last['bits_per_byte/held_out']:.3f}"
    split = manifest["splits"]["validation"]
    assert values["bits per byte by xz -9"] == f"{8 * split['xz_bytes'] / split['compressed_text_bytes']:.3f}"
    flops = 4 * 8 * 32 * train_flops_per_token(config.model, 32)
    assert values["FLOPs"].startswith(f"{flops:.3g},")
    assert values["tokens seen"].startswith("1,024 (")
    assert values["steps"] == "4 of 4"
    assert values["learning rate"] == "warm-up over 2 steps to 0.002, cosine decay to 0 at the last step"
    assert values["optimizer"].startswith("Muon on matrices (momentum 0.95, Nesterov, 5 Newton-Schulz steps")
    source = manifest["sources"][0]
    assert f"| {source['documents']:,} | {source['bytes']:,} | {source['tokens']:,} |" in text
    assert "![Loss over tokens](loss.png)" in text
    assert missing_card_parts(text) == []


def test_front_matter_is_valid_on_the_hub(card_args):
    card = ModelCard(model_card(**card_args))
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["deepseek_v3", "moe", "muon", "moonlight-stack"],
    }
    assert card.text.lstrip().startswith("# someone/tiny\n")


def test_card_contains_no_local_path(card_args):
    source = card_args["manifests"]["data"]["sources"][0]
    parent, name = source["path"].rsplit("/", 1)
    manifest = card_args["manifests"]["data"] | {"sources": [source, source | {"path": "C:\\Users\\me\\my|texts\\"}]}
    text = model_card(**card_args | {"manifests": {"data": manifest}, "imported_from": "/home/me/base-model/"})
    assert f"| {name} |" in text and "| my\\|texts |" in text and "`base-model`" in text
    assert parent not in text and "Users" not in text and "/home" not in text
    assert "base_model" not in ModelCard(text).data.to_dict()


def test_card_omits_unknown_values(card_args):
    text = model_card(**card_args | {"manifests": None})  # the data folder has moved
    assert "bits per byte of the held-out text" in text and "gzip" not in text
    nothing = {"license": None, "metrics": [], "manifests": None, "curve": False}
    text = model_card(**card_args | nothing)
    assert "license" not in ModelCard(text).data.to_dict()
    assert "The license of this model is not stated." in text
    assert "data is unknown" in text and "No losses" in text and "loss.png" not in text
    assert "### Evaluation" not in text and "epochs" not in text
    assert not re.search(r"\b(None|nan)\b", text)
    assert missing_card_parts(text) == ["a license"]


def test_an_intermediate_checkpoint_has_the_results_of_its_step(card_args):
    text = model_card(**card_args | {"step": 2, "consumed_tokens": 512})
    values = rows(text)
    assert values["training loss of the last step"] == f"{card_args['metrics'][1]['loss/train']:.4f} nats per token"
    assert "held-out loss" not in values and "validation loss" not in values
    assert values["steps"] == "2 of 4" and "an intermediate checkpoint" in text


def test_the_curve_of_an_earlier_checkpoint_ends_with_it(tiny_run, tmp_path):
    for step, name in ((2, "early"), (4, "late")):
        export(tiny_run.folder, tmp_path / name, revision_step=step, repo="someone/tiny")
    early, late = (tmp_path / name / "loss.png" for name in ("early", "late"))
    assert early.read_bytes() != late.read_bytes()
    assert 'model="someone/tiny"' in (early.parent / "README.md").read_text()


def test_card_states_that_bfloat16_weights_are_rounded(card_args):
    assert "before the export rounded the float32 master weights to bfloat16" in model_card(**card_args)
    assert "rounded" not in model_card(**card_args | {"dtype": "float32"})


def test_a_license_unknown_to_the_hub_becomes_other(card_args):
    for value, license, name in (("MIT", "mit", None), ("apache-2.0", "apache-2.0", None), ("acme", "other", "acme")):
        data = ModelCard(model_card(**card_args | {"license": value})).data
        assert (data.license, data.get("license_name")) == (license, name)


def test_averaged_weights_have_no_losses_of_their_own(card_args):
    text = model_card(**card_args | {"averaged_steps": (2, 4)})
    assert "the mean of the checkpoints after steps 2, 4." in text
    assert "losses of the weights after step 4, before averaging" in text


def test_an_imported_model(card_args):
    imported = card_args | {
        "config": None,
        "manifests": None,
        "metrics": [],
        "imported_from": "owner/base",
        "curve": False,
    }
    text = model_card(**imported)
    card = ModelCard(text)
    assert card.data.base_model == "owner/base" and "muon" not in card.data.tags
    assert "imported from [owner/base](https://huggingface.co/owner/base)" in text
    assert "## Training" not in text and "Muon" not in text and "to follow instructions" not in text
    further = model_card(**card_args | {"imported_from": "owner/base"})
    assert "trained further for 4 steps on 1,024 tokens, starting from the weights of [owner/base]" in further


def test_adamw_is_not_called_muon(card_args):
    config = replace(card_args["config"], optimizer=replace(card_args["config"].optimizer, name="adamw"))
    text = model_card(**card_args | {"config": config})
    assert rows(text)["optimizer"].endswith("on every parameter") and "uon" not in text.replace("Muon is", "")


def test_card_states_the_update_scale(card_args):
    for matching, words in (
        ("adjusted_lr", "update scaled by 0.2 * sqrt(max(rows, columns))); AdamW"),
        ("update_norm", "update scaled to an RMS of 0.2); AdamW"),
        ("baseline", f"update scaled by 0.2 * sqrt({card_args['config'].model.hidden_size})); AdamW"),
    ):
        optimizer = replace(card_args["config"].optimizer, rms_matching=matching)
        assert (
            words
            in rows(model_card(**card_args | {"config": replace(card_args["config"], optimizer=optimizer)}))[
                "optimizer"
            ]
        )


def test_evaluation_table_is_below_the_results(card_args):
    text = model_card(**card_args | {"evaluation": "# Tasks\n\n| task | score |\n|---|---|\n| arc_easy | 0.31 |\n"})
    headings = re.findall(r"^#+ .*", text, re.MULTILINE)
    index = headings.index("### Evaluation")
    assert headings[index - 1] == "## Results" and headings[index + 1] == "#### Tasks"
    assert "| arc_easy | 0.31 |" in text


def python_snippet(text, folder):
    """Return the card's Python snippet for `folder`, with 3 new tokens because the tiny model's context is short."""
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return snippet.replace("someone/tiny", str(folder)).replace("max_new_tokens=32", "max_new_tokens=3")


def test_a_local_run_is_not_linked_as_a_hub_model(card_args, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = replace(card_args["config"], train=replace(card_args["config"].train, initial_checkpoint="runs/base"))
    card = model_card(**card_args | {"imported_from": _first_weights({}, config)})
    assert "starting from the weights of `base`" in card and "huggingface.co/runs" not in card
    assert "base_model" not in ModelCard(card).data.to_dict()


def test_the_snippet_of_a_base_model_runs(card_args, exported, capfd):
    scope = {}
    exec(python_snippet(model_card(**card_args), exported), scope)
    tokenizer = scope["tokenizer"]
    ids = scope["complete"].preprocess(scope["prompt"])["input_ids"][0].tolist()
    assert ids[0] == tokenizer.eos_token_id and tokenizer.decode(ids[1:]) == "The"
    assert capfd.readouterr().out


def test_the_snippet_of_a_chat_model_runs(card_args, exported, capfd):
    text = model_card(**card_args | {"chat": True})
    assert "conversational" in ModelCard(text).data.tags and "It is a chat model" in text
    scope = {}
    # The card's question is longer than the tiny model's context.
    exec(python_snippet(text, exported).replace("Who are you?", "?"), scope)
    tokenizer = scope["tokenizer"]
    ids = tokenizer.apply_chat_template(scope["messages"], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_user|>")
    assert capfd.readouterr().out


def test_the_snippet_of_an_imported_model_runs(card_args, exported, capfd):
    text = model_card(**card_args | {"config": None, "imported_from": "owner/base"})
    exec(python_snippet(text, exported), {})
    assert capfd.readouterr().out


@pytest.mark.parametrize(("rank", "switch"), [(512, False), (16, True)])
def test_vllm_command_has_the_mla_switch_only_if_needed(card_args, rank, switch):
    model = replace(card_args["model_config"], kv_lora_rank=rank, qk_rope_head_dim=64)
    assert ("VLLM_MLA_DISABLE=1 vllm serve" in model_card(**card_args | {"model_config": model})) == switch


@pytest.mark.parametrize(
    ("license", "front"),
    [
        ("MIT", {"license": "mit"}),
        (" cc-by-sa-4.0 ", {"license": "cc-by-sa-4.0"}),
        ("Our own: research only", {"license": "other", "license_name": "our-own-research-only"}),
        ("Unknown", {}),
    ],
)
def test_licenses(card_args, license, front):
    data = ModelCard(model_card(**card_args | {"license": license})).data.to_dict()
    assert {key: value for key, value in data.items() if key.startswith("license")} == front


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("# Tiny\n", "front matter"),
        ("---\nlicense: mit\n# Tiny\n", "front matter"),
        ("---\nlicense: [mit\n---\n# Tiny\n", "YAML"),
        ("---\n- license\n---\n# Tiny\n", "keys and values"),
        ("---\n1: mit\n---\n# Tiny\n", "keys and values"),
        ("---\ntags: [moe]\n---\n# Tiny\n", "a license"),
        ("---\nlicense: unknown\n---\n# Tiny\n", "a license"),
        ("---\nlicense: null\n---\n# Tiny\n", "a license"),
        ("---\nlicense: other\n---\n# Tiny\n", "license_name"),
        ("---\nlicense: mit\n---\n\n", "text below"),
        ("---\nlicense: mit\n---\n# Tiny\n[More Information Needed]\n", "[More Information Needed]"),
        ("---\nlicense: mit\n---\n# Tiny\nTODO: data\n", "TODO"),
        ("---\nlicense: mit\n---\n# Tiny\n| /home/me/texts | 3 |\n", "/home/me/texts"),
    ],
)
def test_missing_card_parts(text, missing):
    (part,) = missing_card_parts(text)
    assert missing in part


def test_a_dense_model_is_called_dense(card_args):
    model = replace(card_args["model_config"], first_k_dense_replace=card_args["model_config"].num_hidden_layers)
    text = model_card(**(card_args | {"model_config": model, "config": replace(card_args["config"], model=model)}))
    assert "A dense language model" in text and "all dense" in text
    assert "moe" not in ModelCard(text).data.tags
    assert not re.search(r"routed|expert load|mixture", text)
