"""Which parameter goes to Muon and which to AdamW, and which matrices a parameter holds."""

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Parameters whose checkpoint name matches `pattern`."""

    pattern: str
    algorithm: str
    """muon or adamw."""
    num_matrices: int = 1
    """Matrices stacked along the rows: one matrix is what the Hugging Face model calls one matrix, so a fused
    gate-and-up projection is two. Tensors of three dimensions are one matrix per expert besides."""


RULES = (
    Rule(pattern="embedding.word_embeddings.weight", algorithm="adamw"),
    Rule(pattern="output_layer.weight", algorithm="adamw"),
    Rule(pattern="*layernorm.weight", algorithm="adamw"),
    Rule(pattern="decoder.layers.*.self_attention.linear_*.weight", algorithm="muon"),
    Rule(pattern="decoder.layers.*.mlp.router.weight", algorithm="muon"),
    Rule(pattern="decoder.layers.*.mlp.experts.*_proj", algorithm="muon"),
    Rule(pattern="decoder.layers.*.linear_fc1.weight", algorithm="muon", num_matrices=2),
    Rule(pattern="decoder.layers.*.linear_fc2.weight", algorithm="muon"),
)
"""First match wins (arXiv 2502.16982, 2.2: AdamW for embedding, head and norms; Muon for every other matrix)."""


def route(keys: list[str], rules: tuple[Rule, ...] = RULES) -> dict[str, Rule]:
    """The rule of every parameter; raises ValueError listing those that no rule claims."""
    routes = {key: next((rule for rule in rules if fnmatchcase(key, rule.pattern)), None) for key in keys}
    unclaimed = [key for key, rule in routes.items() if rule is None]
    if unclaimed:
        raise ValueError(f"no optimizer rule claims {', '.join(unclaimed)}")
    return {key: rule for key, rule in routes.items() if rule is not None}
