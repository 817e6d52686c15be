"""Groups of parameters whose norms and spectra are watched together (arXiv 2502.16982, 3.4, Figure 4). No torch."""

from fnmatch import fnmatchcase
from functools import cache

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
GROUPS = tuple(_PATTERNS)
MATRIX_GROUPS = GROUPS[:6]
"""Those of the paper, which hold the matrices that Muon orthogonalises."""


@cache
def group_of(key: str) -> str:
    """The group of a parameter, by its name in checkpoints."""
    found = [name for name, patterns in _PATTERNS.items() if any(fnmatchcase(key, pattern) for pattern in patterns)]
    assert len(found) == 1, (key, found)
    return found[0]
