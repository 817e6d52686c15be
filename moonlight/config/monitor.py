"""The monitor section of a recipe."""

from dataclasses import dataclass

from moonlight.config.checks import NonNegative, check_fields, require


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Measurements in addition to the loss. Every step's metrics have norms of gradients and updates by group."""

    every_steps: NonNegative[int] = 10
    """Steps between measurements of weight RMS by group, attention logits and expert load by layer, and memory. The
    first step has them too. 0: never."""
    svd_entropy_every_steps: NonNegative[int] = 100
    """Steps between measurements of the weights' SVD entropy by group: a multiple of every_steps; 0: never."""
    peak_tflops: NonNegative[float] = 0.0
    """Dense peak of one process's device in 10^12 FLOP/s; speed/mfu is the fraction in use. 0 looks the GPU's name up
    if train.dtype is bfloat16; speed/mfu is left out if the name is not known."""
    wandb_project: str = ""
    """Also send the metrics to this Weights & Biases project (`pip install wandb`). Its other settings come from the
    environment: WANDB_API_KEY, WANDB_MODE=offline. Empty: off."""

    def __post_init__(self) -> None:
        check_fields("monitor", self)
        often, seldom = self.every_steps, self.svd_entropy_every_steps
        require(
            seldom == 0 or (often > 0 and seldom % often == 0),
            f"monitor.svd_entropy_every_steps is {seldom}: it must be 0 or a multiple of monitor.every_steps ({often})",
        )
