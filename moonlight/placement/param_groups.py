"""Which parameter goes to Muon and which to AdamW, and which rows of a parameter are one matrix. No torch."""

from collections import Counter
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache

from moonlight.config.model import ModelConfig
from moonlight.config.optimizer import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class ParamGroupRule:
    """Parameters whose checkpoint name matches `pattern`."""

    pattern: str
    algorithm: str
    """muon or adamw."""
    num_matrices: int = 1
    """Matrices of equal height stacked along the rows: one matrix is what the Hugging Face model calls one matrix, so a
    fused gate-and-up projection is two. Tensors of three dimensions are one matrix per expert besides."""
    head_rows: tuple[int, ...] = ()
    """Heights of the matrices of one attention head, which repeat along the rows; not empty only in `per_head`."""
    use_weight_decay: bool = True


PARAM_GROUP_RULES = (
    ParamGroupRule(pattern="embedding.word_embeddings.weight", algorithm="adamw"),
    ParamGroupRule(pattern="output_layer.weight", algorithm="adamw"),
    ParamGroupRule(pattern="*layernorm.weight", algorithm="adamw"),
    ParamGroupRule(pattern="decoder.layers.*.self_attention.linear_*.weight", algorithm="muon"),
    ParamGroupRule(pattern="decoder.layers.*.mlp.router.weight", algorithm="muon"),
    ParamGroupRule(pattern="decoder.layers.*.mlp.experts.*_proj", algorithm="muon"),
    ParamGroupRule(pattern="decoder.layers.*.linear_fc1.weight", algorithm="muon", num_matrices=2),
    ParamGroupRule(pattern="decoder.layers.*.linear_fc2.weight", algorithm="muon"),
)
"""First match wins (arXiv 2502.16982, 2.2: AdamW for embedding, head and norms; Muon for every other matrix)."""


def param_group_rules(optimizer_config: OptimizerConfig, model_config: ModelConfig) -> tuple[ParamGroupRule, ...]:
    """The rules that a recipe asks for."""
    if optimizer_config.name == "adamw":
        return tuple(replace(rule, algorithm="adamw") for rule in PARAM_GROUP_RULES)
    if optimizer_config.matrices == "per_matrix":
        return PARAM_GROUP_RULES
    query = (model_config.qk_nope_head_dim, model_config.qk_rope_head_dim)
    key_value = (model_config.qk_nope_head_dim, model_config.v_head_dim)
    by_head = {"linear_q_proj": query, "linear_q_up_proj": query, "linear_kv_up_proj": key_value}
    heads = tuple(
        ParamGroupRule(pattern=f"decoder.layers.*.self_attention.{name}.weight", algorithm="muon", head_rows=rows)
        for name, rows in by_head.items()
    )
    return heads + PARAM_GROUP_RULES


def match_rules(keys: list[str], rules: tuple[ParamGroupRule, ...] = PARAM_GROUP_RULES) -> dict[str, ParamGroupRule]:
    """The rule of every parameter: the first whose pattern matches its name.

    Raises:
        ValueError: listing the parameters that no rule claims, and those claimed twice: by two rules of one pattern, or
            because two parameters have one name.
    """
    matching = {key: [rule for rule in rules if fnmatchcase(key, rule.pattern)] for key in keys}
    unclaimed = [key for key, found in matching.items() if not found]
    if unclaimed:
        raise ValueError(f"no optimizer rule claims {', '.join(unclaimed)}")
    repeated = {pattern for pattern, count in Counter(rule.pattern for rule in rules).items() if count > 1}
    twice = [key for key, found in matching.items() if repeated & {rule.pattern for rule in found}]
    twice += [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise ValueError(f"optimizer rules claim twice: {', '.join(twice)}")
    return {key: found[0] for key, found in matching.items()}


def rows_per_matrix(rule: ParamGroupRule, shape: tuple[int, ...]) -> list[int]:
    """Rows of each matrix of a parameter that is laid out as rows on one rank: [rows, columns], or [experts, rows,
    columns] with the experts' rows one after another."""
    if len(shape) == 3:
        return [shape[1]] * shape[0]
    if rule.head_rows:
        assert shape[0] % sum(rule.head_rows) == 0, (rule, shape)
        return list(rule.head_rows) * (shape[0] // sum(rule.head_rows))
    assert shape[0] % rule.num_matrices == 0, (rule, shape)
    return [shape[0] // rule.num_matrices] * rule.num_matrices


_PATTERNS = {
    "attention_qo": ("*.linear_q_*proj.weight", "*.self_attention.linear_proj.weight"),
    "attention_kv": ("*.linear_kv_*proj.weight",),
    "experts": ("*.mlp.experts.*",),
    "shared_experts": ("*.mlp.shared_experts.*",),
    "router": ("*.mlp.router.weight",),
    "dense": ("*.mlp.linear_fc?.weight",),
    "embedding": ("embedding.word_embeddings.weight",),
    "head": ("output_layer.weight",),
    "norms": ("*layernorm.weight",),
}
MONITOR_GROUPS = tuple(_PATTERNS)
MATRIX_GROUPS = MONITOR_GROUPS[:6]
"""Those of the paper, which hold the matrices that Muon orthogonalises."""


@cache
def find_monitor_group(key: str) -> str:
    """The group of a parameter, by its name in checkpoints."""
    found = [name for name, patterns in _PATTERNS.items() if any(fnmatchcase(key, pattern) for pattern in patterns)]
    assert len(found) == 1, (key, found)
    return found[0]
