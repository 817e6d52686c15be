"""An instruction-tuned model for the servers: the model of `checkpoint.py` after `moonlight sft` on simple tasks.

    python tests/serving/instruct.py FOLDER INSTRUCT.json

writes FOLDER/tuned (the run) and FOLDER/instruct (its export), and transformers' float32 answers to held-out
conversations: greedy ids, their text, and the smallest margin between the two largest logits.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from checkpoint import MODEL, moonlight
from prompts import INSTRUCT_ANSWER_TOKENS, INSTRUCT_CHATS
from transformers import AutoModelForCausalLM, AutoTokenizer

from moonlight.config.data import DataConfig
from moonlight.config.load import to_yaml
from moonlight.config.schedule import ScheduleConfig
from moonlight.data.chat_tasks import HELD_OUT_FILE, TRAIN_FILE, write_tasks
from tests.support.layouts import recipe

SEQUENCE_LENGTH = 128


def tune(folder: Path) -> None:
    """Write FOLDER/tuned and FOLDER/instruct."""
    write_tasks(folder / "tasks", 4000, INSTRUCT_CHATS, seed=1)
    inputs = ("--input", folder / "tasks" / TRAIN_FILE, "--tokenizer", folder / "tokenizer")
    moonlight("data", "prepare-chat", *inputs, "--sequence-length", SEQUENCE_LENGTH, "--out", folder / "chats")
    base = recipe()
    train_config = replace(
        base.train,
        train_steps=0,
        epochs=1,
        global_batch_size=8,
        micro_batch_size=8,
        initial_checkpoint=str(folder / "run" / "checkpoints" / "step-00000001"),
    )
    config = replace(
        base,
        name="tuned",
        runs_folder=str(folder),
        model=MODEL,
        data=DataConfig(
            path=str(folder / "chats"),
            tokenizer=str(folder / "tokenizer"),
            sequence_length=SEQUENCE_LENGTH,
            conversations=True,
            mask_documents=True,
            reset_positions=True,
        ),
        schedule=ScheduleConfig(lr=5e-3, warmup_steps=10, decay="linear", router_bias_update_rate=0.0),
        train=train_config,
    )
    (folder / "tuned.yaml").write_text(to_yaml(config))
    moonlight("sft", folder / "tuned.yaml")
    moonlight("export", folder / "tuned", "--out", folder / "instruct", "--dtype", "bfloat16", "--chat")


@torch.no_grad()
def main(folder: Path, reference: Path) -> None:
    tune(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "instruct")
    model = AutoModelForCausalLM.from_pretrained(folder / "instruct", dtype=torch.float32).eval()
    end_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answers = []
    for line in (folder / "tasks" / HELD_OUT_FILE).read_text().splitlines():
        *messages, expected = json.loads(line)["messages"]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_length=None,
            max_new_tokens=INSTRUCT_ANSWER_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = output.sequences[0, ids.shape[1] :].tolist()
        answers.append(
            {
                "messages": messages,
                "prompt_tokens": ids.shape[1],
                "new_ids": new,
                "text": tokenizer.decode(new, skip_special_tokens=True),
                "ended": new[-1] == end_id,
                "right": expected["content"],
                "margin": -torch.stack(output.logits)[:, 0].topk(2).values.diff().max().item(),
            }
        )
    reference.write_text(json.dumps({"version": transformers.__version__, "chats": answers}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
