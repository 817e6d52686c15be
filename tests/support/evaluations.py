"""Helpers for the tests of evaluation: small models of several families, and datasets in a local folder."""

import json
import shutil
from pathlib import Path


def write_dense(path, family, tokenizer_folder, max_position_embeddings=128):
    """Save a random dense model of the family (llama or qwen2) with transformers, and add a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    hf_config = AutoConfig.for_model(
        family,
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_position_embeddings,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(hf_config).save_pretrained(path)
    for file in Path(tokenizer_folder).iterdir():
        shutil.copy(file, path)
    return path


GSM8K = [
    {
        "question": f"Anna has {n} apples and buys {n + 1}. How many has she?",
        "answer": f"{n} + {n + 1}\n#### {2 * n + 1}",
    }
    for n in range(6)
]


def write_gsm8k(data_dir):
    """Write a dataset with gsm8k's name and columns, in the layout of `hf download`."""
    folder = data_dir / "openai" / "gsm8k"
    (folder / "main").mkdir(parents=True)
    for split in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in GSM8K)
        (folder / "main" / f"{split}.jsonl").write_text(lines)
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n"
    card += "".join(f"  - split: {split}\n    path: main/{split}.jsonl\n" for split in ("train", "test"))
    (folder / "README.md").write_text(f"{card}---\n")
    return data_dir


def items(folder, benchmark):
    """Return the answers that an evaluation wrote for a benchmark."""
    return [json.loads(line) for line in (folder / f"{benchmark}.items.jsonl").read_text().splitlines()]
