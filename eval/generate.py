"""A completion, or an answer, from an exported folder, by plain transformers."""

import sys
from pathlib import Path

from eval.folder import chat_ids, context_length, load_chat_tokenizer, load_model, load_tokenizer
from moonlight.errors import UserError

MAX_TEMPERATURE = 10.0


def generate(
    folder: Path, prompt: str, max_new_tokens: int, *, chat: bool = False, temperature: float = 0.0, seed: int = 0
) -> str:
    """The prompt and its continuation; with `chat` the answer alone.

    Args:
        chat: the prompt is what a user says, and goes through the folder's chat template.
        temperature: 0 takes the likeliest token each time; above 0 draws from the distribution so sharpened.
        seed: of the draws.

    Raises:
        UserError: `folder` is no Hugging Face folder or has no chat template, or the prompt leaves no room in the
            model's context.
    """
    if not 0 <= temperature <= MAX_TEMPERATURE:
        raise UserError(f"temperature is {temperature}: it must be from 0 to {MAX_TEMPERATURE}")
    import torch

    most = (context_length(folder) or sys.maxsize) - 1
    if chat:
        tokenizer = load_chat_tokenizer(folder)
        ids = chat_ids(tokenizer, [{"role": "user", "content": prompt}])
    else:
        tokenizer = load_tokenizer(folder)
        # Training documents begin after an end-of-text id, so that is how a prompt begins.
        ids = [tokenizer.eos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    if len(ids) > most:
        raise UserError(f"the prompt has {len(ids)} tokens: at most {most} leave room for an answer")
    model = load_model(folder)
    torch.manual_seed(seed)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_length=None,
            max_new_tokens=min(max_new_tokens, most + 1 - len(ids)),
            **({"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}),
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.decode(output[0, len(ids) if chat else 1 :], skip_special_tokens=True)
