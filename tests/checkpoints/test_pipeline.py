"""Exported folders work in plain `transformers.pipeline`; a chat export changes the end tokens."""

import json

import pytest
import torch
from transformers import AutoTokenizer, pipeline

from checkpoints.export import export
from checkpoints.hf_import import import_folder
from moonlight.errors import UserError
from tests.support.hugging_face import make_folder

QUESTION = [{"role": "user", "content": "What is a heap?"}]


@pytest.fixture(scope="module")
def folders(tiny_run, tmp_path_factory):
    """Exports of the tiny run, one plain and one for chat."""
    folder = tmp_path_factory.mktemp("hf")
    for name, chat in (("plain", False), ("chat", True)):
        export(tiny_run.folder, folder / name, chat=chat)
    return folder


def argmax_chain(generator, ids, count):
    """Return `count` greedy ids after `ids`, each from a full forward pass."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat([tokens, generator.model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0, len(ids) :].tolist()


def test_text_and_chat_by_the_pipeline(folders):
    generator = pipeline("text-generation", model=str(folders / "chat"))
    tokenizer = generator.tokenizer
    assert type(generator.model).__module__.startswith("transformers.models.deepseek_v3")

    prompt = "import os\n"
    chain = argmax_chain(generator, tokenizer(prompt)["input_ids"], 6)
    (answer,) = generator(prompt, max_new_tokens=6, min_new_tokens=6, max_length=None)
    assert answer["generated_text"] == prompt + tokenizer.decode(chain, skip_special_tokens=True)

    markers = {
        name: tokenizer.convert_tokens_to_ids(f"<|im_{name}|>") for name in ("user", "middle", "end", "assistant")
    }
    content = tokenizer(QUESTION[0]["content"])["input_ids"]
    role, answerer = tokenizer("user")["input_ids"], tokenizer("assistant")["input_ids"]
    ids = [markers["user"], *role, markers["middle"], *content, markers["end"]]
    ids += [markers["assistant"], *answerer, markers["middle"]]
    chain = argmax_chain(generator, ids, 6)
    (answer,) = generator(QUESTION, max_new_tokens=6, min_new_tokens=6, max_length=None)
    *previous, last = answer["generated_text"]
    assert previous == QUESTION
    assert last == {"role": "assistant", "content": tokenizer.decode(chain, skip_special_tokens=True)}


@pytest.mark.parametrize(
    ("name", "end_of_config", "ends_of_generation", "spelled_out_is_marker"),
    [("plain", "[EOS]", ["[EOS]"], False), ("chat", "<|im_end|>", ["<|im_end|>", "[EOS]"], True)],
)
def test_end_tokens_of_generation(folders, name, end_of_config, ends_of_generation, spelled_out_is_marker):
    tokenizer = AutoTokenizer.from_pretrained(folders / name)
    ids = tokenizer.convert_tokens_to_ids
    config, generation = (
        json.loads((folders / name / file).read_text())["eos_token_id"]
        for file in ("config.json", "generation_config.json")
    )
    assert config == ids(end_of_config)
    assert generation == ids(ends_of_generation)
    assert (tokenizer("<|im_end|>")["input_ids"] == [ids("<|im_end|>")]) == spelled_out_is_marker


def test_an_answer_ends_with_the_message(folders):
    """The answer is empty if the end marker has the largest logit at its first token."""
    generator = pipeline("text-generation", model=str(folders / "chat"))
    end_id = generator.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = generator.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        state = generator.model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        generator.model.lm_head.weight[end_id] = 100 * state
    (answer,) = generator(QUESTION, max_new_tokens=6, max_length=None)
    assert answer["generated_text"][-1] == {"role": "assistant", "content": ""}


def test_chat_and_plain_exports_are_different_content(tiny_run, folders):
    assert not export(tiny_run.folder, folders / "chat", chat=True)
    with pytest.raises(UserError, match="different content"):
        export(tiny_run.folder, folders / "chat")


def test_a_tokenizer_without_an_end_of_message_is_refused(fast_folder, tmp_path):
    import_folder(make_folder(tmp_path / "source"), tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"has no <\|im_end\|>"):
        export(tmp_path / "checkpoint", tmp_path / "hf", tokenizer=fast_folder, chat=True)
    with pytest.raises(UserError, match="has no tokenizer, which --chat needs"):
        export(tmp_path / "checkpoint", tmp_path / "hf", chat=True)
    assert not (tmp_path / "hf").exists()
