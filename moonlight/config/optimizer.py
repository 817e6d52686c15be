"""The optimizer section of a recipe."""

from dataclasses import dataclass

from moonlight.config.checks import one_of, positive, require


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Muon for matrices, AdamW for embedding, head and norms, one learning rate for both (arXiv 2502.16982, 2.2)."""

    name: str = "muon"
    """muon, or adamw: AdamW for every parameter."""
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    num_newton_schulz_steps: int = 5
    coefficients: str = "moonlight"
    rms_match: float = 0.2
    """The RMS c that an update is to have, as AdamW's would."""
    rms_matching: str = "adjusted_lr"
    """How it gets that (arXiv 2502.16982, 3.1). adjusted_lr: times c * sqrt(max(rows, columns)), right for any shape;
    update_norm: divided by its own RMS, times c; baseline: times c * sqrt(hidden_size), for all shapes alike."""
    newton_schulz_dtype: str = "bfloat16"
    matrices: str = "per_matrix"
    """What is orthogonalised as one matrix. per_matrix: what the Hugging Face model calls one. per_head: besides, the
    query and key-value up-projections split by head, and each head by its nope, rope or value rows."""
    momentum_dtype: str = "float32"
    """Muon's momentum; bfloat16 halves it."""
    master_weights: str = "float32"
    """float32, or split: the bfloat16 weight and the 16 bits it lacks, the same values in half the memory."""
    gradient_dtype: str = "float32"
    """Of gradient sums over micro-batches and of what ranks send to owners, who add up in float32. bfloat16 halves
    both; each micro-batch after the first then rounds the sum."""
    qk_clip: float = 0.0
    """MuonClip (Kimi K2, arXiv 2507.20534, 2.1): largest attention logit of a head before its query and key weights
    are scaled down, 100 in the paper; 0 switches it off."""
    adamw_beta1: float = 0.9
    adamw_beta2: float = 0.95
    adamw_eps: float = 1e-8
    clip_grad_norm: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        one_of("optimizer.name", self.name, ("muon", "adamw"))
        one_of("optimizer.newton_schulz_dtype", self.newton_schulz_dtype, ("float32", "bfloat16"))
        one_of("optimizer.matrices", self.matrices, ("per_matrix", "per_head"))
        one_of("optimizer.rms_matching", self.rms_matching, ("adjusted_lr", "update_norm", "baseline"))
        one_of("optimizer.momentum_dtype", self.momentum_dtype, ("float32", "bfloat16"))
        one_of("optimizer.gradient_dtype", self.gradient_dtype, ("float32", "bfloat16"))
        one_of("optimizer.master_weights", self.master_weights, ("float32", "split"))
        one_of("optimizer.coefficients", self.coefficients, ("moonlight", "polar_express", "deepseekv4"))
        positive(
            "optimizer",
            num_newton_schulz_steps=self.num_newton_schulz_steps,
            rms_match=self.rms_match,
            adamw_eps=self.adamw_eps,
        )
        for name in ("momentum", "adamw_beta1", "adamw_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} is {value}: it must be at least 0 and less than 1")
        for name in ("weight_decay", "clip_grad_norm", "qk_clip"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name} is {value}: it must be at least 0")
