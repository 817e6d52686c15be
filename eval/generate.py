"""Generation of a completion or an answer from an exported folder, with transformers."""

import sys
from pathlib import Path

from eval.folder import chat_ids, context_length, load_chat_tokenizer, load_model, load_tokenizer
from moonlight.errors import UserError

MAX_TEMPERATURE = 10.0


def generate(
    folder: Path, prompt: str, max_new_tokens: int, *, chat: bool = False, temperature: float = 0.0, seed: int = 0
) -> str:
    """Return the prompt and its continuation; with `chat` only the answer.

    Args:
        max_new_tokens: maximum number of generated tokens; the context of the model may limit it further.
        chat: treat the prompt as a user message, and apply the chat template of the folder.
        temperature: 0 is greedy; above 0 samples at this temperature, at most MAX_TEMPERATURE.
        seed: seed of the samples.

    Raises:
        UserError: `temperature` is out of range, transformers cannot load `folder`, it has no chat template, or the
            prompt fills the model's context.
    """
    if not 0 <= temperature <= MAX_TEMPERATURE:
        raise UserError(f"temperature is {temperature}: it must be from 0 to {MAX_TEMPERATURE}")
    import torch

    max_prompt_tokens = (context_length(folder) or sys.maxsize) - 1
    if chat:
        tokenizer = load_chat_tokenizer(folder)
        ids = chat_ids(tokenizer, [{"role": "user", "content": prompt}])
    else:
        tokenizer = load_tokenizer(folder)
        # Training documents follow an end-of-text id, so a prompt starts with one.
        ids = [tokenizer.eos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    if len(ids) > max_prompt_tokens:
        raise UserError(f"the prompt has {len(ids)} tokens: at most {max_prompt_tokens} leave room for an answer")
    model = load_model(folder)
    torch.manual_seed(seed)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_length=None,
            max_new_tokens=min(max_new_tokens, max_prompt_tokens + 1 - len(ids)),
            **({"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}),
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.decode(output[0, len(ids) if chat else 1 :], skip_special_tokens=True)
