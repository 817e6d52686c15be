"""Conversations for the tests of tuning, and the functions that multi-process tests run on each rank."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from moonlight.config.run import RunConfig
from tests.support.layouts import build, collect, flatten_gradients, recipe

CHATS = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"What is {first} + {first % 3}?"},
        {"role": "assistant", "content": f"{first + first % 3}"},
        *(
            [{"role": "tool", "content": f"len: {first}\n"}, {"role": "assistant", "content": "def f(x): pass " * 2}]
            if first % 2
            else []
        ),
    ]
    for first in range(40)
]


def write_chats(path: Path, chats: list[list[dict]] = CHATS) -> Path:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    return path


def tuning_recipe(data: Path, tokenizer: Path, length: int = 128, **changes: Any) -> RunConfig:
    """Return a config of the small model for the conversations in `data`."""
    config = recipe(**changes)
    return replace(
        config,
        model=replace(config.model, vocab_size=1024, max_position_embeddings=length, aux_loss_alpha=0.0),
        data=replace(
            config.data,
            path=str(data),
            tokenizer=str(tokenizer),
            sequence_length=length,
            mask_documents=True,
            reset_positions=True,
        ),
    )


def whole_set_gradients(config: RunConfig, change: str = "") -> dict[str, Any]:
    """Return the loss and gradient chunks of one batch that has every training conversation once.

    `change` alters labels: of the tokens in the loss ("learnt"), or of all other tokens ("prompt").
    """
    from moonlight.data.loader import ChatTrainDataset
    from moonlight.train.forward_backward import forward_backward, local_samples, make_micro_batches

    model_chunks, optimizer = build(config)
    samples = ChatTrainDataset(Path(config.data.path), config.data.sequence_length, 2, seed=1)
    total = -(-samples.num_windows // 8) * 8  # padding follows the last window
    local_windows = [samples.window(index) for index in local_samples(range(total))]
    batches = make_micro_batches(local_windows, config, 2)
    if change:
        for batch in batches:
            selected = batch.loss_mask == (1 if change == "learnt" else 0)
            batch.labels[selected] = (batch.labels[selected] + 7) % config.model.vocab_size
    weights = collect(model_chunks)
    optimizer.data_parallel.zero_grad_buffer()
    loss, count = forward_backward(model_chunks, config, batches)
    return {
        "loss": loss.item(),
        "count": count.item(),
        "windows": samples.num_windows,
        "weights": weights,
        "gradients": flatten_gradients(optimizer),
    }
