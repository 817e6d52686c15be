"""The checkpoint that the servers are given: made by our engine, exported by `moonlight export --chat`.

    python tests/serving/checkpoint.py FOLDER

writes FOLDER/run (a run folder with a checkpoint), FOLDER/hf (its export in bfloat16) and FOLDER/broken (a copy whose
config.json has no `scoring_func`). The shape is the smallest that vLLM's own latent attention on CPU takes: heads and
latent of Moonlight's sizes, few of everything else.
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
    initializer_range=0.06,  # three times the usual: logits far enough apart for the same greedy ids everywhere
)


def moonlight(*arguments: object) -> None:
    """Run the `moonlight` command in a process of its own."""
    subprocess.run([sys.executable, "-m", "moonlight.cli", *map(str, arguments)], check=True)


def train_tokenizer(folder: Path) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    inputs = [word for name in CORPUS for word in ("--input", library / f"{name}.py")]
    moonlight("tokenizer", "train", *inputs, "--vocab-size", VOCAB_SIZE, "--out", folder)


def save(config: RunConfig, head_rows: dict[int, torch.Tensor], step: int) -> Path:
    """Save a checkpoint with initial weights, non-zero router biases, and some rows of the head as given."""
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
def row_that_ends(folder: Path, end_id: int) -> torch.Tensor:
    """A row [hidden] of the head: with it the end-of-message id wins at one step of the greedy answer, not before.

    Weights are random, so nothing taught the model to end an answer. The row is the smallest whose product with the
    final hidden state is the largest logit plus 5 at that step, and 0 at all steps before it.
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
    assert end_id not in output.sequences[0, ids.shape[1] :], "the answer ends by itself: choose another seed"
    states = torch.stack([step[-1][0, -1] for step in output.hidden_states])
    logits = torch.stack(output.logits)[:, 0]
    torch.testing.assert_close(states @ model.lm_head.weight.T, logits)  # these are what the head multiplies
    wanted = torch.zeros(len(states))
    wanted[-1] = logits[-1].max() + 5
    return torch.linalg.lstsq(states, wanted).solution


def main(folder: Path) -> None:
    tokenizer = folder / "tokenizer"
    train_tokenizer(tokenizer)
    base = recipe()
    run = replace(
        base, name="run", runs_folder=str(folder), model=MODEL, data=replace(base.data, tokenizer=str(tokenizer))
    )
    control_ids = {token["content"]: token["id"] for token in _added_tokens(tokenizer)}
    silent = {row: torch.zeros(MODEL.hidden_size) for row in control_ids.values()}
    moonlight("export", save(run, silent, step=1), "--out", folder / "endless", "--dtype", "bfloat16", "--chat")
    end_id = control_ids["<|im_end|>"]
    ending = {end_id: row_that_ends(folder / "endless", end_id)}
    moonlight("export", save(run, silent | ending, step=2), "--out", folder / "hf", "--dtype", "bfloat16", "--chat")
    shutil.copytree(folder / "hf", folder / "broken")
    config = json.loads((folder / "broken" / "config.json").read_text())
    del config["scoring_func"]
    (folder / "broken" / "config.json").write_text(json.dumps(config, indent=2))


def _added_tokens(tokenizer: Path) -> list[dict]:
    return json.loads((tokenizer / "tokenizer.json").read_text())["added_tokens"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
