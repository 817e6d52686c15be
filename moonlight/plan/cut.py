"""The parameters that a layout would give one rank, cut from the rows of `mapping.table` as Megatron cuts them.

All ranks of a pipeline stage have parameters of the same shapes, in the same order, so one list serves for each stage.
`tests/plan/test_plan_cut.py` compares it with the model that is built.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from moonlight.config.model import Model
from moonlight.config.optimizer import Optimizer
from moonlight.config.pipeline import layers_of_stages
from moonlight.config.run import Run
from moonlight.dist_checkpoint import hf_mapping
from moonlight.dist_checkpoint.hf_mapping import Row
from moonlight.placement.owners import Outline
from moonlight.placement.param_groups import Rule, matrix_heights, route, rules_of

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
class PlannedParameter:
    """One parameter of every rank of a pipeline stage."""

    key: str
    """Name in checkpoints."""
    whole_shape: tuple[int, ...]
    """As the model has it, experts [experts, in, out]."""
    rule: Rule
    outline: Outline
    slicing: str
    """How tensor parallelism treats its matrices: alone, cut or replicated, as in `moonlight.optim.parameters`."""
    cut_axis: int
    is_expert: bool
    is_copy: bool
    """Whether it is the last stage's copy of a tied embedding."""

    @property
    def numel(self) -> int:
        return self.outline.numel


def stage_parameters(run: Run, stage: int) -> list[PlannedParameter]:
    """The parameters of a rank of a pipeline stage, in the model's order."""
    parallel, model = run.parallel, run.model
    chunks = layers_of_stages(
        model.num_hidden_layers, parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    )[stage]
    is_last = stage == parallel.pipeline_parallel_size - 1
    rows, rules = _rows(model, run.optimizer)
    keys = [EMBEDDING] if stage == 0 else []
    for layer in (layer for chunk in chunks for layer in chunk):
        keys += rows.by_layer[layer]
    if is_last:
        keys.append(FINAL_NORM)
        if not model.tie_word_embeddings:
            keys.append(HEAD)
        elif stage > 0:
            keys.append(EMBEDDING)
    return [_planned(run, index, rows.by_key[key], rules[key], stage) for index, key in enumerate(keys)]


@dataclass(frozen=True)
class _Rows:
    by_key: dict[str, Row]
    by_layer: dict[int, list[str]]


@lru_cache(maxsize=4)
def _rows(model: Model, optimizer: Optimizer) -> tuple[_Rows, dict[str, Rule]]:
    """Of a model and an optimizer; the layouts that a search tries have them in common."""
    trained = [row for row in hf_mapping.table(model) if row.parts[0].kind != "bias"]
    by_layer: dict[int, list[str]] = {}
    for row in trained:
        if row.key.startswith("decoder.layers."):
            by_layer.setdefault(int(row.key.split(".")[2]), []).append(row.key)
    for keys in by_layer.values():
        keys.sort(key=lambda key: _ORDER.index(_module(key)))
    keys = [row.key for row in trained]
    rules = route(keys, rules_of(optimizer, model))
    return _Rows({row.key: row for row in trained}, by_layer), rules


def _module(key: str) -> str:
    """linear_fc1 of ...mlp.linear_fc1.weight, up_proj of ...mlp.experts.up_proj."""
    return key.removesuffix(".weight").rsplit(".", 1)[-1]


def _planned(run: Run, index: int, row: Row, rule: Rule, stage: int) -> PlannedParameter:
    parallel, model, module = run.parallel, run.model, _module(row.key)
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
    slicing = "alone" if slices == 1 or (axis == -2 and rule.head_rows) else "cut" if axis else "replicated"
    is_tied = row.key == EMBEDDING and model.tie_word_embeddings and parallel.pipeline_parallel_size > 1
    columns = shape[-1] if len(shape) > 1 else 1
    return PlannedParameter(
        key=row.key,
        whole_shape=tuple(whole),
        rule=rule,
        outline=Outline(index, columns, tuple(_heights(row, rule, shape)), rule.algorithm == "muon", is_tied),
        slicing=slicing,
        cut_axis=axis if slicing == "cut" else 0,
        is_expert=is_expert,
        is_copy=is_tied and stage > 0,
    )


def _heights(row: Row, rule: Rule, shape: Sequence[int]) -> Iterator[int]:
    if rule.algorithm == "muon":
        yield from matrix_heights(rule, tuple(shape))
    elif len(shape) == 3:
        yield shape[0] * shape[1]
    else:  # gate and up are two parts of one parameter
        for _ in row.parts:
            yield shape[0] // len(row.parts)
