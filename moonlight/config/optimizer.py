"""The optimizer section of a recipe."""

from dataclasses import dataclass
from typing import Literal

from moonlight.config.checks import Fraction, NonNegative, Positive, check_fields

FloatType = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Muon for matrices, AdamW for embedding, head and norms, one learning rate for both (arXiv 2502.16982, 2.2)."""

    name: Literal["muon", "adamw"] = "muon"
    """muon, or adamw: AdamW for every parameter."""
    weight_decay: NonNegative[float] = 0.1
    """Decoupled weight decay of every parameter, times the learning rate."""
    momentum: Fraction = 0.95
    """Momentum of Muon."""
    nesterov: bool = True
    """Nesterov's form of that momentum."""
    num_newton_schulz_steps: Positive[int] = 5
    """Newton-Schulz iterations of each update."""
    coefficients: Literal["moonlight", "polar_express", "deepseekv4"] = "moonlight"
    """Coefficients of the Newton-Schulz polynomial."""
    rms_match: Positive[float] = 0.2
    """Target RMS c of an update: that of AdamW's."""
    rms_matching: Literal["adjusted_lr", "update_norm", "baseline"] = "adjusted_lr"
    """How an update gets its RMS (arXiv 2502.16982, 3.1). adjusted_lr: times c * sqrt(max(rows, columns)), right for
    any shape; update_norm: divided by its own RMS, times c; baseline: times c * sqrt(hidden_size) for all shapes."""
    newton_schulz_dtype: FloatType = "bfloat16"
    """Dtype of the Newton-Schulz products."""
    matrices: Literal["per_matrix", "per_head"] = "per_matrix"
    """Matrices that are orthogonalized. per_matrix: each matrix of the Hugging Face model. per_head: query and
    key-value up-projections are also split by head, and each head into its nope, rope or value rows."""
    momentum_dtype: FloatType = "float32"
    """Dtype of Muon's momentum; bfloat16 halves its memory."""
    master_weights: Literal["float32", "split"] = "float32"
    """float32, or split: the bfloat16 weight and the 16 bits it lacks, the same values in half the memory."""
    gradient_dtype: FloatType = "float32"
    """Dtype of gradient sums over micro-batches and of gradients sent to owner ranks, which add in float32. bfloat16
    halves both; each micro-batch after the first then rounds the sum."""
    qk_clip: NonNegative[float] = 0.0
    """MuonClip (Kimi K2, arXiv 2507.20534, 2.1): a head whose largest attention logit exceeds this gets smaller query
    and key weights. The paper has 100; 0 is off."""
    adamw_beta1: Fraction = 0.9
    """Decay of AdamW's first moment."""
    adamw_beta2: Fraction = 0.95
    """Decay of AdamW's second moment."""
    adamw_eps: Positive[float] = 1e-8
    """Added to AdamW's denominator."""
    clip_grad_norm: NonNegative[float] = 1.0
    """Largest global gradient norm; 0 is off."""

    def __post_init__(self) -> None:
        check_fields("optimizer", self)
