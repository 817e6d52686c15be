"""The monitor section of a recipe."""

from dataclasses import dataclass

from moonlight.config.checks import require


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """What is watched beside the loss. Norms of gradients and updates by group are in the metrics of every step."""

    every_steps: int = 10
    """How often, besides the first step, weight RMS by group, attention logits and expert load by layer, and memory are
    in the metrics; 0: never."""
    svd_entropy_every_steps: int = 100
    """How often the SVD entropy of the weights by group is: a multiple of every_steps; 0: never."""
    peak_tflops: float = 0.0
    """Dense peak of one process's device in 10^12 FLOP/s, of which speed/mfu is the share in use; 0 takes it from the
    name of the GPU if train.dtype is bfloat16, and leaves speed/mfu out where that is not known."""
    wandb_project: str = ""
    """Send the metrics to this project of Weights & Biases too (`pip install wandb`), which takes its own settings from
    the environment: WANDB_API_KEY, WANDB_MODE=offline. Empty: do not."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "svd_entropy_every_steps", "peak_tflops"):
            value = getattr(self, name)
            require(value >= 0, f"monitor.{name} is {value}: it must be at least 0")
        often, seldom = self.every_steps, self.svd_entropy_every_steps
        require(
            seldom == 0 or (often > 0 and seldom % often == 0),
            f"monitor.svd_entropy_every_steps is {seldom}: it must be 0 or a multiple of monitor.every_steps ({often})",
        )
