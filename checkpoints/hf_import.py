"""A Hugging Face folder as a checkpoint that training starts from, in one process, tensor by tensor."""

import dataclasses
from pathlib import Path

import torch
import yaml

from checkpoints.hf_config import model_config_from_hf
from checkpoints.hf_folder import (
    DTYPES,
    GENERATION_FILE,
    STALE,
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

    Values are stored as they are (float16 as float32, which holds it exactly); `out` also gets the tokenizer, if the
    folder has one, and `recipe.yaml`, which a recipe can name as its `base:`. No code of the folder is run.

    Returns:
        False if `out` already was made of this folder.

    Raises:
        UserError: the folder is incomplete, damaged, or of a model that cannot be trained on; no room; or `out` exists
            with something else in it.
    """
    check_output(out, STATE_FILE)
    source = open_folder(folder)
    model_config = model_config_from_hf(source.config, folder / "config.json")
    check_tensors(source, model_config)
    has_tokenizer = bool(tokenizer_files(folder))
    tokenizer = Tokenizer.load(folder) if has_tokenizer else None
    if tokenizer and tokenizer.num_text_ids > model_config.vocab_size:
        raise UserError(
            f"tokenizer {folder} makes {tokenizer.num_text_ids} ids from text, vocab_size of its config.json is "
            f"{model_config.vocab_size}: the embedding needs a row for each"
        )
    generation = folder / GENERATION_FILE
    if generation.is_file():
        read_json_strict(generation)
    origin = {
        "imported_from": _name(folder),
        "config_sha256": sha256_checksum(folder / "config.json"),
        # Other weights of the same shapes have the same sizes.
        "files": {name: [(stat := (folder / name).stat()).st_size, stat.st_mtime_ns] for name in source.files},
    }
    if is_up_to_date(out, origin):
        return False
    check_listed_sums(source)

    def add_files(part: Path) -> None:
        if has_tokenizer:
            copy_tokenizer(folder, part / TOKENIZER_FOLDER)
            if generation.is_file():
                atomic_write_text(part / TOKENIZER_FOLDER / GENERATION_FILE, generation.read_text("utf-8"))
        atomic_write_text(part / RECIPE_FILE, _recipe(folder, out, model_config, has_tokenizer))

    write_checkpoint(
        out,
        "importing",
        model_config=model_config,
        config=None,
        state=TrainState(),
        origin=origin,
        tokenizer_sha256=tokenizer.sha256 if tokenizer else "",
        dtypes={row.key: _stored_dtype(source, row) for row in hf_mapping.tensor_mappings(model_config)},
        read=lambda row, part: source.tensors[part.name].read().to(_stored_dtype(source, row)),
        add_files=add_files,
    )
    return True


def check_tensors(source: HuggingFaceFolder, model_config: ModelConfig) -> None:
    """Every tensor that the configuration asks for is there in its shape, and no other but stale ones.

    Raises:
        UserError: one is missing, unknown, of another shape, or of a dtype that cannot be trained on.
    """
    config = source.path / "config.json"
    experts = 3 * model_config.num_experts * (model_config.num_hidden_layers - model_config.first_k_dense_replace)
    if experts > len(source.tensors):  # said before a table is made of what may be billions
        raise UserError(
            f"{config} asks for {experts} tensors of experts (num_hidden_layers {model_config.num_hidden_layers}, "
            f"n_routed_experts {model_config.num_experts}), {source.path} has {len(source.tensors)} tensors in all"
        )
    wanted = {part.name: part for row in hf_mapping.tensor_mappings(model_config) for part in row.hf_tensors}
    for name, part in wanted.items():
        tensor = source.tensors.get(name)
        if tensor is None:
            raise UserError(f"{source.path} lacks the tensor {name}, which {config} asks for")
        if tensor.shape != part.shape:
            raise UserError(f"{tensor.file}: {name} has shape {tensor.shape}, {config} asks for {part.shape}")
        if tensor.dtype not in DTYPES:
            raise UserError(f"{tensor.file}: {name} is {tensor.dtype}; accepted are {', '.join(DTYPES)}")
    for name, tensor in source.tensors.items():
        if name not in wanted and name.startswith(f"model.layers.{model_config.num_hidden_layers}."):
            raise UserError(
                f"{tensor.file}: {name} is of a layer beyond num_hidden_layers {model_config.num_hidden_layers} of "
                f"{config}: "
                "layers that predict further tokens (num_nextn_predict_layers) are not supported"
            )
        if name not in wanted and not name.endswith(STALE):
            raise UserError(f"{tensor.file}: {name} has no place in the model that {config} declares")


def _stored_dtype(source: HuggingFaceFolder, row: hf_mapping.TensorMapping) -> torch.dtype:
    """bfloat16 if all of the row's tensors are; router biases are always float32."""
    kinds = {source.tensors[part.name].dtype for part in row.hf_tensors}
    return torch.bfloat16 if kinds == {"BF16"} and row.hf_tensors[0].init_kind != "bias" else torch.float32


def _name(folder: Path) -> str:
    """Of the folder, on one line, without bytes that are no text."""
    return " ".join(folder.resolve().name.encode("utf-8", "replace").decode().split())


def _recipe(folder: Path, out: Path, model_config: ModelConfig, has_tokenizer: bool) -> str:
    tree: dict = {"model": dataclasses.asdict(model_config), "train": {"initial_checkpoint": str(out)}}
    if has_tokenizer:
        tree["data"] = {"tokenizer": str(out / TOKENIZER_FOLDER)}
    return (
        f"# The model of {_name(folder)}, for a recipe that trains on from it: name this file as its base:,\n"
        "# and add name, data.path, data.sequence_length, schedule and train.\n"
        + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    )
