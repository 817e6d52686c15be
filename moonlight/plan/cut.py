"""The parameters of one rank under a layout: `hf_mapping.tensor_mappings`, sharded as Megatron shards them.

All ranks of a pipeline stage have parameters of the same shapes in the same order, so each stage needs one list.
`tests/plan/test_plan_cut.py` compares the list with the built model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from moonlight.config.model import ModelConfig
from moonlight.config.optimizer import OptimizerConfig
from moonlight.config.pipeline import stage_layers
from moonlight.config.run import RunConfig
from moonlight.dist_checkpoint import hf_mapping
from moonlight.dist_checkpoint.hf_mapping import TensorMapping
from moonlight.placement.owners import ParamSpec
from moonlight.placement.param_groups import ParamGroupRule, match_rules, param_group_rules, rows_per_matrix
from moonlight.plan.flops import EMBEDDING, HEAD

FINAL_NORM = "decoder.final_layernorm.weight"

_BY_ROWS = ("word_embeddings", "output_layer", "linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "linear_fc1")
"""Modules whose [out, in] weight tensor parallelism splits along rows (Megatron: column-parallel)."""
_BY_COLUMNS = ("linear_proj", "linear_fc2")
"""Modules whose [out, in] weight tensor parallelism splits along columns (Megatron: row-parallel)."""

_ORDER = (
    "input_layernorm",
    "linear_proj",
    "linear_q_proj",
    "linear_q_down_proj",
    "linear_q_up_proj",
    "linear_kv_down_proj",
    "linear_kv_up_proj",
    "q_layernorm",
    "kv_layernorm",
    "pre_mlp_layernorm",
    "router",
    "gate_proj",
    "up_proj",
    "down_proj",
    "linear_fc1",
    "linear_fc2",
)
"""Order of a layer's modules in Megatron's model; gradient and weight exchange use the same order."""


@dataclass(frozen=True)
class PlannedParam:
    """One parameter of every rank of a pipeline stage."""

    key: str
    """Name in checkpoints."""
    global_shape: tuple[int, ...]
    """Shape of the unsharded parameter in the model; experts are [experts, in, out]."""
    rule: ParamGroupRule
    spec: ParamSpec
    tp_mode: str
    """Tensor parallelism of its matrices: unsharded, sharded or replicated, as in `moonlight.optim.parameters`."""
    tp_dim: int
    """Split dimension of a sharded parameter, -2 or -1; 0 for other parameters."""
    is_expert: bool
    is_embedding_replica: bool
    """True for the last stage's copy of a tied embedding."""

    @property
    def numel(self) -> int:
        return self.spec.numel


def stage_parameters(config: RunConfig, stage: int) -> list[PlannedParam]:
    """Return the parameters of each rank of a pipeline stage, in the model's order."""
    parallel, model_config = config.parallel, config.model
    chunks = stage_layers(
        model_config.num_hidden_layers, parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    )[stage]
    is_last = stage == parallel.pipeline_parallel_size - 1
    mappings, rules, keys_by_layer = _trained_mappings(model_config, config.optimizer)
    keys = [EMBEDDING] if stage == 0 else []
    for layer in (layer for chunk in chunks for layer in chunk):
        keys += keys_by_layer[layer]
    if is_last:
        keys.append(FINAL_NORM)
        if not model_config.tie_word_embeddings:
            keys.append(HEAD)
        elif stage > 0:
            keys.append(EMBEDDING)
    return [_plan_param(config, index, mappings[key], rules[key], stage) for index, key in enumerate(keys)]


@lru_cache(maxsize=4)
def _trained_mappings(
    model_config: ModelConfig, optimizer_config: OptimizerConfig
) -> tuple[dict[str, TensorMapping], dict[str, ParamGroupRule], dict[int, list[str]]]:
    """Return trained tensors and their rules by key, and the keys of each layer. All layouts of a search share them."""
    trained = [
        mapping for mapping in hf_mapping.tensor_mappings(model_config) if mapping.hf_tensors[0].init_kind != "bias"
    ]
    keys_by_layer: dict[int, list[str]] = {}
    for mapping in trained:
        if mapping.key.startswith("decoder.layers."):
            keys_by_layer.setdefault(int(mapping.key.split(".")[2]), []).append(mapping.key)
    for keys in keys_by_layer.values():
        keys.sort(key=lambda key: _ORDER.index(_module(key)))
    mappings = {mapping.key: mapping for mapping in trained}
    return mappings, match_rules([*mappings], param_group_rules(optimizer_config, model_config)), keys_by_layer


def _module(key: str) -> str:
    """Return linear_fc1 for ...mlp.linear_fc1.weight, up_proj for ...mlp.experts.up_proj."""
    return key.removesuffix(".weight").rsplit(".", 1)[-1]


def _plan_param(
    config: RunConfig, index: int, mapping: TensorMapping, rule: ParamGroupRule, stage: int
) -> PlannedParam:
    parallel, model_config, module = config.parallel, config.model, _module(mapping.key)
    is_expert = ".mlp.experts." in mapping.key
    num_slices = parallel.expert_tensor_parallel_size if is_expert else parallel.tensor_parallel_size
    shape = list(mapping.shape)
    if is_expert:
        shape[1:] = reversed(shape[1:])
        global_shape = tuple(shape)
        shape[0] //= parallel.expert_parallel_size
        split_dim = -2 if module == "down_proj" else -1
    else:
        global_shape = tuple(shape)
        split_dim = -2 if module in _BY_ROWS else -1 if module in _BY_COLUMNS else 0
    tp_mode = "replicated"
    if split_dim:
        shape[split_dim] //= num_slices
        tp_mode = "sharded"
    if num_slices == 1 or (split_dim == -2 and rule.head_rows):
        tp_mode = "unsharded"
    is_tied = mapping.key == EMBEDDING and model_config.tie_word_embeddings and parallel.pipeline_parallel_size > 1
    columns = shape[-1] if len(shape) > 1 else 1
    return PlannedParam(
        key=mapping.key,
        global_shape=global_shape,
        rule=rule,
        spec=ParamSpec(index, columns, tuple(_block_rows(mapping, rule, shape)), rule.algorithm == "muon", is_tied),
        tp_mode=tp_mode,
        tp_dim=split_dim if tp_mode == "sharded" else 0,
        is_expert=is_expert,
        is_embedding_replica=is_tied and stage > 0,
    )


def _block_rows(mapping: TensorMapping, rule: ParamGroupRule, shape: Sequence[int]) -> Iterator[int]:
    if rule.algorithm == "muon":
        yield from rows_per_matrix(rule, tuple(shape))
    elif len(shape) == 3:
        yield shape[0] * shape[1]
    else:  # gate and up are two parts of one parameter
        for _ in mapping.hf_tensors:
            yield shape[0] // len(mapping.hf_tensors)
