"""The model card: what it says is what the run says, its front matter is the Hub's, its snippets run."""

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
def known(tiny_run):
    """What is known of the finished tiny run, as arguments of `model_card`."""
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
    """Name -> value of every row of a table with two columns."""
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE))


def test_the_card_says_what_the_run_says(known):
    run, last, manifest = known["config"], known["metrics"][-1], known["manifests"]["data"]
    text = model_card(**known)
    found = rows(text)
    assert found["parameters"] == f"{count_parameters(run.model).total:,}"
    assert found["held-out loss"] == f"{last['loss/held_out']:.4f} nats per token"
    assert found["bits per byte of the held-out text"] == f"{last['bits_per_byte/held_out']:.3f}"
    split = manifest["splits"]["validation"]
    assert found["bits per byte by xz -9"] == f"{8 * split['xz_bytes'] / split['compressed_text_bytes']:.3f}"
    flops = 4 * 8 * 32 * train_flops_per_token(run.model, 32)
    assert found["FLOPs"].startswith(f"{flops:.3g},")
    assert found["tokens seen"].startswith("1,024 (")
    assert found["steps"] == "4 of 4"
    assert found["learning rate"] == "warm-up over 2 steps to 0.002, cosine decay to 0 at the last step"
    assert found["optimizer"].startswith("Muon on matrices (momentum 0.95, Nesterov, 5 Newton-Schulz steps")
    source = manifest["sources"][0]
    assert f"| {source['documents']:,} | {source['bytes']:,} | {source['tokens']:,} |" in text
    assert "![Loss over tokens](loss.png)" in text
    assert missing_card_parts(text) == []


def test_the_front_matter_is_the_hubs(known):
    card = ModelCard(model_card(**known))
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["deepseek_v3", "moe", "muon", "moonlight-stack"],
    }
    assert card.text.lstrip().startswith("# someone/tiny\n")


def test_no_folder_of_this_machine_is_told(known):
    source = known["manifests"]["data"]["sources"][0]
    parent, name = source["path"].rsplit("/", 1)
    manifest = known["manifests"]["data"] | {"sources": [source, source | {"path": "C:\\Users\\me\\my|texts\\"}]}
    text = model_card(**known | {"manifests": {"data": manifest}, "imported_from": "/home/me/base-model/"})
    assert f"| {name} |" in text and "| my\\|texts |" in text and "`base-model`" in text
    assert parent not in text and "Users" not in text and "/home" not in text
    assert "base_model" not in ModelCard(text).data.to_dict()


def test_what_is_unknown_is_not_told(known):
    text = model_card(**known | {"manifests": None})  # the data has been moved since
    assert "bits per byte of the held-out text" in text and "gzip" not in text
    nothing = {"license": None, "metrics": [], "manifests": None, "curve": False}
    text = model_card(**known | nothing)
    assert "license" not in ModelCard(text).data.to_dict()
    assert "The license of this model is not stated." in text
    assert "data is unknown" in text and "No losses" in text and "loss.png" not in text
    assert "### Evaluation" not in text and "epochs" not in text
    assert not re.search(r"\b(None|nan)\b", text)
    assert missing_card_parts(text) == ["a license"]


def test_a_checkpoint_on_the_way_has_the_results_of_its_step(known):
    text = model_card(**known | {"step": 2, "consumed_tokens": 512})
    found = rows(text)
    assert found["training loss of the last step"] == f"{known['metrics'][1]['loss/train']:.4f} nats per token"
    assert "held-out loss" not in found and "validation loss" not in found
    assert found["steps"] == "2 of 4" and "an intermediate checkpoint" in text


def test_the_curve_of_an_earlier_checkpoint_ends_with_it(tiny_run, tmp_path):
    for step, name in ((2, "early"), (4, "late")):
        export(tiny_run.folder, tmp_path / name, revision_step=step, repo="someone/tiny")
    early, late = (tmp_path / name / "loss.png" for name in ("early", "late"))
    assert early.read_bytes() != late.read_bytes()
    assert 'model="someone/tiny"' in (early.parent / "README.md").read_text()


def test_rounded_weights_are_said_to_be(known):
    assert "before the export rounded the float32 master weights to bfloat16" in model_card(**known)
    assert "rounded" not in model_card(**known | {"dtype": "float32"})


def test_a_name_that_is_no_licence_of_the_hub_is_one_of_its_own(known):
    for given, license, name in (("MIT", "mit", None), ("apache-2.0", "apache-2.0", None), ("acme", "other", "acme")):
        data = ModelCard(model_card(**known | {"license": given})).data
        assert (data.license, data.get("license_name")) == (license, name)


def test_averaged_weights_have_no_losses_of_their_own(known):
    text = model_card(**known | {"averaged_steps": (2, 4)})
    assert "the mean of the checkpoints after steps 2, 4." in text
    assert "losses of the weights after step 4, before averaging" in text


def test_an_imported_model(known):
    imported = known | {"config": None, "manifests": None, "metrics": [], "imported_from": "owner/base", "curve": False}
    text = model_card(**imported)
    card = ModelCard(text)
    assert card.data.base_model == "owner/base" and "muon" not in card.data.tags
    assert "imported from [owner/base](https://huggingface.co/owner/base)" in text
    assert "## Training" not in text and "Muon" not in text and "to follow instructions" not in text
    further = model_card(**known | {"imported_from": "owner/base"})
    assert "trained further for 4 steps on 1,024 tokens, starting from the weights of [owner/base]" in further


def test_adamw_is_not_called_muon(known):
    run = replace(known["config"], optimizer=replace(known["config"].optimizer, name="adamw"))
    text = model_card(**known | {"config": run})
    assert rows(text)["optimizer"].endswith("on every parameter") and "uon" not in text.replace("Muon is", "")


def test_the_scale_of_updates_is_told(known):
    for matching, words in (
        ("adjusted_lr", "update scaled by 0.2 * sqrt(max(rows, columns))); AdamW"),
        ("update_norm", "update scaled to an RMS of 0.2); AdamW"),
        ("baseline", f"update scaled by 0.2 * sqrt({known['config'].model.hidden_size})); AdamW"),
    ):
        optimizer = replace(known["config"].optimizer, rms_matching=matching)
        assert (
            words in rows(model_card(**known | {"config": replace(known["config"], optimizer=optimizer)}))["optimizer"]
        )


def test_a_table_of_evaluation_lies_below_the_results(known):
    text = model_card(**known | {"evaluation": "# Tasks\n\n| task | score |\n|---|---|\n| arc_easy | 0.31 |\n"})
    headings = re.findall(r"^#+ .*", text, re.MULTILINE)
    place = headings.index("### Evaluation")
    assert headings[place - 1] == "## Results" and headings[place + 1] == "#### Tasks"
    assert "| arc_easy | 0.31 |" in text


def python_of(text, folder):
    """The card's Python snippet, for `folder`; few tokens, for the context of the tiny model is short."""
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return snippet.replace("someone/tiny", str(folder)).replace("max_new_tokens=32", "max_new_tokens=3")


def test_a_run_on_this_machine_is_no_model_of_the_hub(known, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = replace(known["config"], train=replace(known["config"].train, initial_checkpoint="runs/base"))
    card = model_card(**known | {"imported_from": _first_weights({}, run)})
    assert "starting from the weights of `base`" in card and "huggingface.co/runs" not in card
    assert "base_model" not in ModelCard(card).data.to_dict()


def test_the_snippet_of_a_base_model_runs(known, exported, capfd):
    scope = {}
    exec(python_of(model_card(**known), exported), scope)
    tokenizer = scope["tokenizer"]
    ids = scope["complete"].preprocess(scope["prompt"])["input_ids"][0].tolist()
    assert ids[0] == tokenizer.eos_token_id and tokenizer.decode(ids[1:]) == "The"
    assert capfd.readouterr().out


def test_the_snippet_of_a_chat_model_runs(known, exported, capfd):
    text = model_card(**known | {"chat": True})
    assert "conversational" in ModelCard(text).data.tags and "It is a chat model" in text
    scope = {}
    # The question of the card is longer than the context of the tiny model.
    exec(python_of(text, exported).replace("Who are you?", "?"), scope)
    tokenizer = scope["tokenizer"]
    ids = tokenizer.apply_chat_template(scope["messages"], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_user|>")
    assert capfd.readouterr().out


def test_the_snippet_of_an_imported_model_runs(known, exported, capfd):
    text = model_card(**known | {"config": None, "imported_from": "owner/base"})
    exec(python_of(text, exported), {})
    assert capfd.readouterr().out


@pytest.mark.parametrize(("rank", "switch"), [(512, False), (16, True)])
def test_vllm_gets_its_switch_where_it_needs_one(known, rank, switch):
    model = replace(known["model_config"], kv_lora_rank=rank, qk_rope_head_dim=64)
    assert ("VLLM_MLA_DISABLE=1 vllm serve" in model_card(**known | {"model_config": model})) == switch


@pytest.mark.parametrize(
    ("license", "front"),
    [
        ("MIT", {"license": "mit"}),
        (" cc-by-sa-4.0 ", {"license": "cc-by-sa-4.0"}),
        ("Our own: research only", {"license": "other", "license_name": "our-own-research-only"}),
        ("Unknown", {}),
    ],
)
def test_licences(known, license, front):
    data = ModelCard(model_card(**known | {"license": license})).data.to_dict()
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
def test_what_a_release_lacks(text, missing):
    (found,) = missing_card_parts(text)
    assert missing in found


def test_a_dense_model_is_called_dense(known):
    model = replace(known["model_config"], first_k_dense_replace=known["model_config"].num_hidden_layers)
    text = model_card(**(known | {"model_config": model, "config": replace(known["config"], model=model)}))
    assert "A dense language model" in text and "all dense" in text
    assert "moe" not in ModelCard(text).data.tags
    assert not re.search(r"routed|expert load|mixture", text)
