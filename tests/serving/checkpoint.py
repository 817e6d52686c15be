"""The checkpoint for the servers, saved by our engine and exported by `moonlight export --chat`.

    python tests/serving/checkpoint.py FOLDER

writes FOLDER/run (a run folder with a checkpoint), FOLDER/hf (its export in bfloat16) and FOLDER/broken (a copy whose
config.json has no `scoring_func`). The shape is the smallest that vLLM's latent attention on CPU accepts: heads and
latent have Moonlight's sizes, all other sizes are small.
"""

import json
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import torch
from prompts import CHAT, CHAT_ANSWER_TOKENS

from moonlight import parallel
from moonlight.config.model import ModelConfig
from moonlight.config.run import RunConfig
from moonlight.data.tokenizer import Tokenizer
from moonlight.dist_checkpoint.async_save import AsyncCheckpointer
from moonlight.dist_checkpoint.state import TrainState, step_folder
from tests.support.layouts import build, recipe

VOCAB_SIZE = 2048
CORPUS = ("argparse", "ast", "csv", "doctest", "enum", "heapq", "tarfile", "typing")
"""Modules of Python's standard library that the tokenizer is trained on."""

MODEL = ModelConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=512,
    moe_intermediate_size=128,
    num_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=512,
    initializer_range=0.06,  # three times the default, so logits differ enough for equal greedy ids
)


def moonlight(*arguments: object) -> None:
    """Run the `moonlight` command in its own process."""
    subprocess.run([sys.executable, "-m", "moonlight.cli", *map(str, arguments)], check=True)


def train_tokenizer(folder: Path) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    inputs = [word for name in CORPUS for word in ("--input", library / f"{name}.py")]
    moonlight("tokenizer", "train", *inputs, "--vocab-size", VOCAB_SIZE, "--out", folder)


def save(config: RunConfig, head_rows: dict[int, torch.Tensor], step: int) -> Path:
    """Save a checkpoint with initial weights, non-zero router biases, and the given rows of the head."""
    tokenizer = Tokenizer.load(Path(config.data.tokenizer))
    parallel.init_single_process()
    try:
        _, optimizer = build(config)
        with optimizer.loading_masters() as state:
            for key, pieces in state.items():
                for (first, *_), values in pieces.chunks:
                    if key.endswith("router.expert_bias"):
                        generator = torch.Generator().manual_seed(int(key.split(".")[2]))
                        values.copy_(0.2 * torch.randn(values.shape, generator=generator))
                    elif key == "output_layer.weight":
                        for row, value in head_rows.items():
                            if first <= row < first + len(values):
                                values[row - first] = value
        folder = Path(config.runs_folder) / config.name / "checkpoints"
        saver = AsyncCheckpointer(folder, config, optimizer, tokenizer.sha256)
        saver.save(TrainState(step=step))
        saver.finalize()
        return step_folder(folder, step)
    finally:
        parallel.destroy_distributed()


@torch.no_grad()
def end_of_message_row(folder: Path, end_id: int) -> torch.Tensor:
    """Return a row [hidden] of the head that makes the end-of-message id win at one step of the greedy answer.

    The weights are random, so without it the model never ends an answer. The row is the smallest whose product with
    the final hidden state is the largest logit plus 5 at that step, and 0 at all earlier steps.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=CHAT_ANSWER_TOKENS + 1,
        max_length=None,
        output_logits=True,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    assert end_id not in output.sequences[0, ids.shape[1] :], "the answer already ends: choose another seed"
    states = torch.stack([step[-1][0, -1] for step in output.hidden_states])
    logits = torch.stack(output.logits)[:, 0]
    torch.testing.assert_close(states @ model.lm_head.weight.T, logits)  # these states are the head's input
    targets = torch.zeros(len(states))
    targets[-1] = logits[-1].max() + 5
    return torch.linalg.lstsq(states, targets).solution


def main(folder: Path) -> None:
    tokenizer = folder / "tokenizer"
    train_tokenizer(tokenizer)
    base = recipe()
    config = replace(
        base, name="run", runs_folder=str(folder), model=MODEL, data=replace(base.data, tokenizer=str(tokenizer))
    )
    control_ids = {token["content"]: token["id"] for token in _added_tokens(tokenizer)}
    silent = {row: torch.zeros(MODEL.hidden_size) for row in control_ids.values()}
    moonlight("export", save(config, silent, step=1), "--out", folder / "endless", "--dtype", "bfloat16", "--chat")
    end_id = control_ids["<|im_end|>"]
    ending = {end_id: end_of_message_row(folder / "endless", end_id)}
    moonlight("export", save(config, silent | ending, step=2), "--out", folder / "hf", "--dtype", "bfloat16", "--chat")
    shutil.copytree(folder / "hf", folder / "broken")
    hf_config = json.loads((folder / "broken" / "config.json").read_text())
    del hf_config["scoring_func"]
    (folder / "broken" / "config.json").write_text(json.dumps(hf_config, indent=2))


def _added_tokens(tokenizer: Path) -> list[dict]:
    return json.loads((tokenizer / "tokenizer.json").read_text())["added_tokens"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
