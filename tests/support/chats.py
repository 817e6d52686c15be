"""Conversations for the tests of tuning, and what its multi-process tests run on each rank."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.support.layouts import Recipe, build, collect, flatten_gradients, recipe

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


def tuning_recipe(data: Path, tokenizer: Path, length: int = 128, **changes: Any) -> Recipe:
    """A recipe of the small model for conversations in `data`."""
    run = recipe(**changes)
    return replace(
        run,
        model=replace(run.model, vocab_size=1024, max_position_embeddings=length, aux_loss_alpha=0.0),
        data=replace(
            run.data,
            path=str(data),
            tokenizer=str(tokenizer),
            sequence_length=length,
            mask_documents=True,
            reset_positions=True,
        ),
    )


def whole_set_gradients(run: Recipe, change: str = "") -> dict[str, Any]:
    """Loss and gradient pieces of one batch that has all training conversations once.

    `change` gives other labels: of the tokens that count ("learnt") or of those that do not ("prompt").
    """
    from moonlight.data.loader import ChatTrainDataset
    from moonlight.train.forward_backward import forward_backward, local_samples, make_micro_batches

    models, optimizer = build(run)
    samples = ChatTrainDataset(Path(run.data.path), run.data.sequence_length, 2, seed=1)
    total = -(-samples.num_windows // 8) * 8  # padding after the last
    mine = [samples.window(number) for number in local_samples(range(total))]
    batches = make_micro_batches(mine, run, 2)
    if change:
        for batch in batches:
            chosen = batch.loss_mask == (1 if change == "learnt" else 0)
            batch.labels[chosen] = (batch.labels[chosen] + 7) % run.model.vocab_size
    weights = collect(models)
    optimizer.data_parallel.zero_grad_buffer()
    loss, count = forward_backward(models, run, batches)
    return {
        "loss": loss.item(),
        "count": count.item(),
        "windows": samples.num_windows,
        "weights": weights,
        "gradients": flatten_gradients(optimizer),
    }
