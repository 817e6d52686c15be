"""What transformers says in float32: the answers that every server must give.

    python tests/serving/reference.py FOLDER ANSWERS.json

The file holds, for each prompt, its ids, the greedy ids that follow with their log-probabilities and their text; and the
greedy answer to the chat.
"""

import json
import sys

import torch
from prompts import CHAT, NEW_TOKENS, PROMPTS
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def main(folder: str, answers: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("transformers."), "remote code"

    def greedy(ids: torch.Tensor, **stop: object) -> tuple[list[int], torch.Tensor]:
        """New ids, and the logits [new ids, vocabulary] that they are the largest of."""
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_length=None,
            output_logits=True,
            return_dict_in_generate=True,
            **stop,
        )
        return output.sequences[0, ids.shape[1] :].tolist(), torch.stack(output.logits)[:, 0]

    prompts = []
    for text in PROMPTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        new, logits = greedy(ids, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)
        prompts.append(
            {
                "ids": ids[0].tolist(),
                "new_ids": new,
                "logprobs": logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None])[:, 0].tolist(),
                "text": tokenizer.decode(new, skip_special_tokens=True),
                "margin": (-logits.topk(2).values.diff()).min().item(),
            }
        )
    chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    new, _ = greedy(chat, max_new_tokens=4 * NEW_TOKENS)
    answer = {"ids": chat[0].tolist(), "new_ids": new, "text": tokenizer.decode(new, skip_special_tokens=True)}
    with open(answers, "w", encoding="utf-8") as file:
        json.dump({"prompts": prompts, "chat": answer, "end_id": tokenizer.convert_tokens_to_ids("<|im_end|>")}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
