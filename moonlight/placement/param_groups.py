"""Rules that assign parameters to Muon or AdamW, and divide their rows into matrices. No torch."""

from collections import Counter
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache

from moonlight.config.model import ModelConfig
from moonlight.config.optimizer import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class ParamGroupRule:
    """Algorithm and matrices of the parameters whose checkpoint name matches `pattern` (fnmatch)."""

    pattern: str
    algorithm: str
    """muon or adamw."""
    num_matrices: int = 1
    """Number of matrices of equal height that are stacked along the rows. A matrix is a matrix of the Hugging Face
    model, so a fused gate-and-up projection has two. Used for 2-D tensors; 3-D tensors hold one matrix per expert."""
    head_rows: tuple[int, ...] = ()
    """Heights of the matrices of one attention head, repeated along the rows. Empty unless `optimizer.matrices` is
    per_head."""
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
    """Return the rules of a recipe, in order: first match wins."""
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
    """Return the rule of each parameter: the first whose pattern matches its name.

    Raises:
        ValueError: lists the parameters that no rule claims, or those claimed twice: by two rules with one pattern, or
            because two parameters have one name.
    """
    matches = {key: [rule for rule in rules if fnmatchcase(key, rule.pattern)] for key in keys}
    unclaimed = [key for key, matching in matches.items() if not matching]
    if unclaimed:
        raise ValueError(f"no optimizer rule claims {', '.join(unclaimed)}")
    repeated = {pattern for pattern, count in Counter(rule.pattern for rule in rules).items() if count > 1}
    twice = [key for key, matching in matches.items() if repeated & {rule.pattern for rule in matching}]
    twice += [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise ValueError(f"optimizer rules claim twice: {', '.join(twice)}")
    return {key: matching[0] for key, matching in matches.items()}


def rows_per_matrix(rule: ParamGroupRule, shape: tuple[int, ...]) -> list[int]:
    """Return the number of rows of each matrix of a parameter on one rank, in row order.

    `shape` is [rows, columns], or [experts, rows, columns], whose experts' rows follow each other.
    """
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
"""Groups of parameters whose norms are logged."""
MATRIX_GROUPS = MONITOR_GROUPS[:6]
"""The groups of the paper, with the matrices that Muon orthogonalizes."""


@cache
def find_monitor_group(key: str) -> str:
    """Return the group of MONITOR_GROUPS that a parameter belongs to, by its name in checkpoints."""
    matches = [name for name, patterns in _PATTERNS.items() if any(fnmatchcase(key, pattern) for pattern in patterns)]
    assert len(matches) == 1, (key, matches)
    return matches[0]
