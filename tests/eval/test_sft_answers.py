"""Chat quickstart: greedy answers, exact match, and all steps in one command that skips finished ones."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from checkpoints.export import export
from eval.exact_match import Answer, exact_match_by_task, generate_answers
from eval.generate import generate
from moonlight.cli import quickstart_chat
from moonlight.config.load import load_recipe, to_yaml
from moonlight.errors import UserError
from tests.support.chats import CHATS, tuning_recipe


@pytest.fixture(scope="module")
def chat_export(tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("chat") / "hf"
    export(tiny_run.folder, out, chat=True)
    return out


def test_batched_answers_equal_single_answers(chat_export):
    """Batched answers equal those of one prompt at a time. The model is not tuned, so the answers are meaningless."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chats = [messages[-3:] for messages in CHATS[:10]]
    batched = generate_answers(chat_export, chats, max_new_tokens=8, batch_size=4)
    tokenizer = AutoTokenizer.from_pretrained(chat_export)
    model = AutoModelForCausalLM.from_pretrained(chat_export, dtype=torch.float32).eval()
    ends = {tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "[EOS]")}
    for messages, answer in zip(chats, batched, strict=True):
        ids = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        new = []
        with torch.no_grad():
            while len(new) < 8 and (not new or new[-1] not in ends):
                new.append(int(model(torch.tensor([[*ids, *new]])).logits[0, -1].argmax()))
        assert answer.wanted == messages[-1]["content"]
        assert answer.ended == (new[-1] in ends)
        assert answer.text == tokenizer.decode(new, skip_special_tokens=True)


def test_exact_match_requires_the_same_text_and_an_end():
    right, long, wrong = Answer("7", "7", True), Answer("7", "7", False), Answer("7", "7 ", True)
    assert [answer.is_exact for answer in (right, long, wrong)] == [True, False, False]
    assert exact_match_by_task([right, long, wrong], ["sum", "sum", "count"]) == {
        "count": {"exact": 0.0, "conversations": 1},
        "sum": {"exact": 0.5, "conversations": 2},
        "all": {"exact": 1 / 3, "conversations": 3},
    }


def test_one_question(chat_export):
    """`generate --chat` returns exactly the answer that exact match scores."""
    (answer,) = generate_answers(
        chat_export, [[{"role": "user", "content": "Repeat: red"}, {"role": "assistant", "content": ""}]]
    )
    assert answer.text
    assert generate(chat_export, "Repeat: red", 32, chat=True) == answer.text


def test_a_folder_without_a_chat_template_is_refused(chat_export, refuses, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(chat_export, folder)
    (folder / "chat_template.jinja").unlink()
    refuses(["generate", folder, "--chat", "--prompt", "Hello"], "hf has no chat template", "--chat")


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"it has no config\.json"):
        generate_answers(tmp_path, [])


def test_the_chat_quickstart_runs_each_step_once(tiny_run, tmp_path, monkeypatch, capfd):
    """The quickstart runs every step with a tiny model and writes table and card; reruns skip finished steps."""
    base = tmp_path / "base"
    shutil.copytree(tiny_run.folder, base)
    shutil.copytree(tiny_run.tokenizer, base / "tokenizer")
    config = tuning_recipe(tmp_path / "runs" / "chat" / "data" / "prepared", base / "tokenizer", 64)
    config = replace(
        config,
        name="chat",
        runs_folder=str(tmp_path / "runs"),
        model=load_recipe(base / "config.yaml").model,
        data=replace(config.data, conversations=True),
        train=replace(config.train, train_steps=0, epochs=1, initial_checkpoint="replaced", threads_per_process=1),
    )
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    monkeypatch.setattr(quickstart_chat, "TRAIN_CONVERSATIONS", 150)
    monkeypatch.setattr(quickstart_chat, "HELD_OUT_CONVERSATIONS", 12)
    quickstart_chat.quickstart_chat(base, tmp_path / "recipe.yaml", [])
    first = capfd.readouterr().out
    folder = tmp_path / "runs" / "chat"
    result = json.loads((folder / "exact_match.json").read_text())
    assert result["before"]["shares"]["all"]["conversations"] == 12 == len(result["after"]["answers"])
    answer = result["after"]["answers"][0]
    assert answer["conversation"][-1]["role"] == "user" and answer["task"] in first and not answer["exact"]
    assert "held-out task" in first and "exact after" in first
    assert "moonlight generate" in first and "--chat --prompt" in first
    card = (folder / "hf" / "README.md").read_text()
    assert "on the tokens of the assistant" in card and "including padding" in card
    generation = json.loads((folder / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"][0] == 4  # <|im_end|>
    assert (folder / "hf" / "chat_template.jinja").read_text() == (
        base / "tokenizer" / "chat_template.jinja"
    ).read_text()

    del result["after"]  # as after an interruption between the two
    (folder / "exact_match.json").write_text(json.dumps(result))
    quickstart_chat.quickstart_chat(base, tmp_path / "recipe.yaml", [])
    resumed = capfd.readouterr().out
    assert "exact match, before: done already" in resumed and "exact match, after: greedy answers" in resumed
    quickstart_chat.quickstart_chat(base, tmp_path / "recipe.yaml", [])
    again = capfd.readouterr().out
    for message in ("have been prepared already", "this run is already finished", "exact match, after: done already"):
        assert message in again
    assert again.count("this checkpoint is exported already") == 2
    with pytest.raises(UserError, match="has no checkpoint: `make quickstart`"):
        quickstart_chat.quickstart_chat(tmp_path, tmp_path / "recipe.yaml", [])
    (folder / "data").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="chat template of the model is in its tuning data"):
        export(folder, tmp_path / "again", chat=True)
    export(folder, tmp_path / "again", chat=True, tokenizer=base / "tokenizer")
