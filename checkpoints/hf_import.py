"""Import of a Hugging Face folder as an initial checkpoint, tensor by tensor in one process."""

import dataclasses
from pathlib import Path

import torch
import yaml

from checkpoints.hf_config import CONFIG_FILE, model_config_from_hf
from checkpoints.hf_folder import (
    DTYPES,
    GENERATION_FILE,
    STALE_SUFFIX,
    HuggingFaceFolder,
    check_listed_sums,
    open_folder,
    read_json_strict,
)
from checkpoints.reader import TOKENIZER_FOLDER
from checkpoints.writer import is_up_to_date, write_checkpoint
from moonlight.config.model import ModelConfig
from moonlight.data.tokenizer import Tokenizer
from moonlight.data.tokenizer_files import copy_tokenizer, tokenizer_files
from moonlight.dist_checkpoint import hf_mapping
from moonlight.dist_checkpoint.state import STATE_FILE, TrainState
from moonlight.errors import UserError
from moonlight.files import atomic_write_text, check_output, sha256_checksum

RECIPE_FILE = "recipe.yaml"


def import_folder(folder: Path, out: Path) -> bool:
    """Write the checkpoint `out` from a Hugging Face folder of the DeepSeek-V3 architecture.

    Values keep their dtype; float16 becomes float32, which is exact. `out` also gets the tokenizer, if the folder has
    one, and `recipe.yaml`, which a recipe can name as its `base:`. No code of the folder runs.

    Returns:
        False if `out` already is the import of this folder.

    Raises:
        UserError: the folder is incomplete, corrupt, or has a model that is not supported; too little disk space; or
            `out` exists with different content.
    """
    check_output(out, STATE_FILE)
    source = open_folder(folder)
    model_config = model_config_from_hf(source.config, folder / CONFIG_FILE)
    check_tensors(source, model_config)
    has_tokenizer = bool(tokenizer_files(folder))
    tokenizer = Tokenizer.load(folder) if has_tokenizer else None
    if tokenizer and tokenizer.num_text_ids > model_config.vocab_size:
        raise UserError(
            f"tokenizer {folder} has {tokenizer.num_text_ids} ids for text, vocab_size of its {CONFIG_FILE} is "
            f"{model_config.vocab_size}: the embedding needs a row for each id"
        )
    generation = folder / GENERATION_FILE
    if generation.is_file():
        read_json_strict(generation)
    origin = {
        "imported_from": _name(folder),
        "config_sha256": sha256_checksum(folder / CONFIG_FILE),
        # The modification time detects other weights of the same shapes, which have the same size.
        "files": {name: [(stat := (folder / name).stat()).st_size, stat.st_mtime_ns] for name in source.files},
    }
    if is_up_to_date(out, origin):
        return False
    check_listed_sums(source)

    def add_files(out_folder: Path) -> None:
        if has_tokenizer:
            copy_tokenizer(folder, out_folder / TOKENIZER_FOLDER)
            if generation.is_file():
                text = generation.read_text("utf-8")
                atomic_write_text(out_folder / TOKENIZER_FOLDER / GENERATION_FILE, text)
        atomic_write_text(out_folder / RECIPE_FILE, _recipe(folder, out, model_config, has_tokenizer))

    write_checkpoint(
        out,
        "importing",
        model_config=model_config,
        config=None,
        state=TrainState(),
        origin=origin,
        tokenizer_sha256=tokenizer.sha256 if tokenizer else "",
        dtypes={it.key: _stored_dtype(source, it) for it in hf_mapping.tensor_mappings(model_config)},
        read=lambda mapping, tensor: source.tensors[tensor.name].read().to(_stored_dtype(source, mapping)),
        add_files=add_files,
    )
    return True


def check_tensors(source: HuggingFaceFolder, model_config: ModelConfig) -> None:
    """Check that the folder has exactly the tensors of the configuration; stale ones are ignored.

    Raises:
        UserError: a tensor is missing or unknown, or its shape or dtype is not supported.
    """
    config_path = source.path / CONFIG_FILE
    num_layers, num_experts = model_config.num_hidden_layers, model_config.num_experts
    num_expert_tensors = 3 * num_experts * (num_layers - model_config.first_k_dense_replace)
    if num_expert_tensors > len(source.tensors):  # checked first: the table below could have billions of entries
        raise UserError(
            f"{config_path} requires {num_expert_tensors} tensors of experts (num_hidden_layers {num_layers}, "
            f"n_routed_experts {num_experts}), {source.path} has {len(source.tensors)} tensors in total"
        )
    expected = {it.name: it for mapping in hf_mapping.tensor_mappings(model_config) for it in mapping.hf_tensors}
    for name, hf_tensor in expected.items():
        tensor = source.tensors.get(name)
        if tensor is None:
            raise UserError(f"{source.path} lacks the tensor {name}, which {config_path} requires")
        if tensor.shape != hf_tensor.shape:
            raise UserError(f"{tensor.file}: {name} has shape {tensor.shape}, {config_path} requires {hf_tensor.shape}")
        if tensor.dtype not in DTYPES:
            raise UserError(f"{tensor.file}: {name} is {tensor.dtype}; accepted are {', '.join(DTYPES)}")
    for name, tensor in source.tensors.items():
        if name not in expected and name.startswith(f"model.layers.{num_layers}."):
            raise UserError(
                f"{tensor.file}: {name} is in a layer beyond num_hidden_layers {num_layers} of "
                f"{config_path}: multi-token prediction layers (num_nextn_predict_layers) are not supported"
            )
        if name not in expected and not name.endswith(STALE_SUFFIX):
            raise UserError(f"{tensor.file}: {name} is not a tensor of the model in {config_path}")


def _stored_dtype(source: HuggingFaceFolder, mapping: hf_mapping.TensorMapping) -> torch.dtype:
    """Return bfloat16 if all Hugging Face tensors of `mapping` are; router biases are always float32."""
    dtypes = {source.tensors[hf_tensor.name].dtype for hf_tensor in mapping.hf_tensors}
    return torch.bfloat16 if dtypes == {"BF16"} and mapping.hf_tensors[0].init_kind != "bias" else torch.float32


def _name(folder: Path) -> str:
    """Return the name of the folder on one line; bytes that are not text become question marks."""
    return " ".join(folder.resolve().name.encode("utf-8", "replace").decode().split())


def _recipe(folder: Path, out: Path, model_config: ModelConfig, has_tokenizer: bool) -> str:
    tree: dict = {"model": dataclasses.asdict(model_config), "train": {"initial_checkpoint": str(out)}}
    if has_tokenizer:
        tree["data"] = {"tokenizer": str(out / TOKENIZER_FOLDER)}
    return (
        f"# The model of {_name(folder)}, for a recipe that continues training it: name this file as its base:,\n"
        "# and add name, data.path, data.sequence_length, schedule and train.\n"
        + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    )
