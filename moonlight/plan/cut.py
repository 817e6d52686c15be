"""The parameters that a layout would give one rank, cut from the rows of `mapping.table` as Megatron cuts them.

All ranks of a pipeline stage have parameters of the same shapes, in the same order, so one list serves for each stage.
`tests/plan/test_plan_cut.py` compares it with the model that is built.
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

EMBEDDING, FINAL_NORM, HEAD = (
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
)

_BY_ROWS = ("word_embeddings", "output_layer", "linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "linear_fc1")
"""Modules that tensor parallelism cuts by rows, [out, in]: column-parallel in Megatron's words."""
_BY_COLUMNS = ("linear_proj", "linear_fc2")

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
"""Of the modules of a layer in Megatron's model, which is that of the exchange."""


@dataclass(frozen=True)
class PlannedParam:
    """One parameter of every rank of a pipeline stage."""

    key: str
    """Name in checkpoints."""
    global_shape: tuple[int, ...]
    """As the model has it, experts [experts, in, out]."""
    rule: ParamGroupRule
    spec: ParamSpec
    tp_mode: str
    """Tensor parallelism of its matrices: unsharded, sharded or replicated, as in `moonlight.optim.parameters`."""
    tp_dim: int
    is_expert: bool
    is_embedding_replica: bool
    """Whether it is the last stage's copy of a tied embedding."""

    @property
    def numel(self) -> int:
        return self.spec.numel


def stage_parameters(config: RunConfig, stage: int) -> list[PlannedParam]:
    """The parameters of a rank of a pipeline stage, in the model's order."""
    parallel, model_config = config.parallel, config.model
    chunks = stage_layers(
        model_config.num_hidden_layers, parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    )[stage]
    is_last = stage == parallel.pipeline_parallel_size - 1
    rows, rules = _rows(model_config, config.optimizer)
    keys = [EMBEDDING] if stage == 0 else []
    for layer in (layer for chunk in chunks for layer in chunk):
        keys += rows.by_layer[layer]
    if is_last:
        keys.append(FINAL_NORM)
        if not model_config.tie_word_embeddings:
            keys.append(HEAD)
        elif stage > 0:
            keys.append(EMBEDDING)
    return [_planned(config, index, rows.by_key[key], rules[key], stage) for index, key in enumerate(keys)]


@dataclass(frozen=True)
class _Rows:
    by_key: dict[str, TensorMapping]
    by_layer: dict[int, list[str]]


@lru_cache(maxsize=4)
def _rows(model_config: ModelConfig, optimizer_config: OptimizerConfig) -> tuple[_Rows, dict[str, ParamGroupRule]]:
    """Of a model and an optimizer; the layouts that a search tries have them in common."""
    trained = [row for row in hf_mapping.tensor_mappings(model_config) if row.hf_tensors[0].init_kind != "bias"]
    by_layer: dict[int, list[str]] = {}
    for row in trained:
        if row.key.startswith("decoder.layers."):
            by_layer.setdefault(int(row.key.split(".")[2]), []).append(row.key)
    for keys in by_layer.values():
        keys.sort(key=lambda key: _ORDER.index(_module(key)))
    keys = [row.key for row in trained]
    rules = match_rules(keys, param_group_rules(optimizer_config, model_config))
    return _Rows({row.key: row for row in trained}, by_layer), rules


def _module(key: str) -> str:
    """linear_fc1 of ...mlp.linear_fc1.weight, up_proj of ...mlp.experts.up_proj."""
    return key.removesuffix(".weight").rsplit(".", 1)[-1]


def _planned(config: RunConfig, index: int, row: TensorMapping, rule: ParamGroupRule, stage: int) -> PlannedParam:
    parallel, model_config, module = config.parallel, config.model, _module(row.key)
    is_expert = ".mlp.experts." in row.key
    slices = parallel.expert_tensor_parallel_size if is_expert else parallel.tensor_parallel_size
    if is_expert:
        count, out, width = row.shape
        whole = [count, width, out]
        axis = -2 if module == "down_proj" else -1
    else:
        whole = list(row.shape)
        axis = -2 if module in _BY_ROWS else -1 if module in _BY_COLUMNS else 0
    shape = list(whole)
    if is_expert:
        shape[0] //= parallel.expert_parallel_size
    if axis:
        shape[axis] //= slices
    tp_mode = "unsharded" if slices == 1 or (axis == -2 and rule.head_rows) else "sharded" if axis else "replicated"
    is_tied = row.key == EMBEDDING and model_config.tie_word_embeddings and parallel.pipeline_parallel_size > 1
    columns = shape[-1] if len(shape) > 1 else 1
    return PlannedParam(
        key=row.key,
        global_shape=tuple(whole),
        rule=rule,
        spec=ParamSpec(index, columns, tuple(_heights(row, rule, shape)), rule.algorithm == "muon", is_tied),
        tp_mode=tp_mode,
        tp_dim=axis if tp_mode == "sharded" else 0,
        is_expert=is_expert,
        is_embedding_replica=is_tied and stage > 0,
    )


def _heights(row: TensorMapping, rule: ParamGroupRule, shape: Sequence[int]) -> Iterator[int]:
    if rule.algorithm == "muon":
        yield from rows_per_matrix(rule, tuple(shape))
    elif len(shape) == 3:
        yield shape[0] * shape[1]
    else:  # gate and up are two parts of one parameter
        for _ in row.hf_tensors:
            yield shape[0] // len(row.hf_tensors)
