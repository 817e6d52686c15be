"""Transformers' float32 answers, which every server must give.

    python tests/serving/reference.py FOLDER REFERENCE.json

The file has, for each prompt, its ids, the greedy continuation with log-probabilities and text, and the smallest
margin between the two largest logits; and the greedy answer to the chat. Plain `pipeline("text-generation")` on the
same folder must give the same texts.
"""

import json
import sys

import torch
import transformers
from prompts import CHAT, NEW_TOKENS, PROMPTS
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


@torch.no_grad()
def main(folder: str, reference: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def greedy(ids: torch.Tensor, **limits: int) -> tuple[list[int], torch.Tensor]:
        """Return the new ids, and their logits [new ids, vocabulary]."""
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_length=None,
            output_logits=True,
            return_dict_in_generate=True,
            **limits,
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
                "margin": -logits.topk(2).values.diff().max().item(),
            }
        )
    chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    new, _ = greedy(chat, max_new_tokens=4 * NEW_TOKENS)
    answer = {
        "ids": chat[0].tolist(),
        "new_ids": new,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "finish_reason": "stop" if new[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") else "length",
    }

    generate = pipeline("text-generation", model=folder, dtype=torch.float32)
    limits = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "max_length": None}
    texts = [generate(text, return_full_text=False, **limits)[0]["generated_text"] for text in PROMPTS]
    assert texts == [prompt["text"] for prompt in prompts], texts
    *_, last = generate(CHAT, max_new_tokens=4 * NEW_TOKENS, max_length=None)[0]["generated_text"]
    assert last == {"role": "assistant", "content": answer["text"]}, last

    with open(reference, "w", encoding="utf-8") as file:
        json.dump({"version": transformers.__version__, "prompts": prompts, "chat": answer}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
