"""A completion from an exported folder, by plain transformers."""

from pathlib import Path

from moonlight.errors import UserError


def generate(folder: Path, prompt: str, max_new_tokens: int) -> str:
    """The prompt and its greedy continuation.

    Raises:
        UserError: `folder` is no Hugging Face folder, or the prompt leaves no room in the model's context.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no Hugging Face folder: it has no config.json; make one with `moonlight export`")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        most = AutoConfig.from_pretrained(folder, trust_remote_code=False).max_position_embeddings - 1
    except Exception as error:  # transformers raises many kinds for a folder that it cannot read
        raise _unusable(folder, error) from error
    # Training documents begin after an end-of-text id, so that is how a prompt begins.
    ids = [tokenizer.eos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    if len(ids) > most:
        raise UserError(f"the prompt has {len(ids)} tokens: at most {most} leave room for an answer")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    except Exception as error:
        raise _unusable(folder, error) from error
    tokens = torch.tensor([ids])
    with torch.no_grad():
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_length=None,
            max_new_tokens=min(max_new_tokens, most + 1 - len(ids)),
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.decode(output[0, 1:], skip_special_tokens=True)


def _unusable(folder: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{folder} is no usable Hugging Face folder ({reason}): make one with `moonlight export`")
