"""The schedule and stages of a recipe: learning rate, stages, batch growth."""

from dataclasses import dataclass, field
from typing import Literal

from moonlight.config.checks import NonNegative, Positive, check_fields, require


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate: linear warm-up, then a decay to min_lr at the end."""

    lr: Positive[float]
    """Learning rate at the end of the warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay: from 0 to lr."""
    warmup_steps: NonNegative[int] = 0
    """Steps from 0, or from the end of the stage before, to lr. Counted at the batch size of the first of them."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay from lr to min_lr; constant stays at lr."""
    router_bias_update_rate: NonNegative[float] = 1e-3
    """u in b += u * (sign(e) - mean(sign(e))): Moonlight's rule for balancing without an auxiliary loss."""

    def check(self, section: str) -> None:
        """Raise UserError, naming `section`, for a value that is out of range."""
        check_fields(section, self)
        require(
            0 <= self.min_lr <= self.lr,
            f"{section}.min_lr is {self.min_lr}: it must be from 0 to {section}.lr ({self.lr})",
        )

    @property
    def end_lr(self) -> float:
        """Learning rate of the last step."""
        return self.lr if self.decay == "constant" else self.min_lr


@dataclass(frozen=True, kw_only=True)
class StageConfig(ScheduleConfig):
    """One stage of a run, from one count of consumed tokens to another."""

    from_tokens: NonNegative[int]
    """End of the previous stage; 0 for the first."""
    to_tokens: int
    """The step that reaches this count is the stage's last."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each of `data.sources` in this stage, in any unit; a source that is not named has none. Empty: the
    sources' own weights."""

    def check(self, section: str) -> None:
        """Raise UserError, naming `section`, for a value that is out of range."""
        super().check(section)
        require(
            self.to_tokens > self.from_tokens,
            f"{section}.to_tokens is {self.to_tokens}: it must be greater than {section}.from_tokens "
            f"({self.from_tokens})",
        )


@dataclass(frozen=True, kw_only=True)
class BatchGrowth:
    """A larger batch from a token count on."""

    after_tokens: int
    """Consumed tokens after which the next step has the larger batch."""
    global_batch_size: int
    """Sequences per optimizer step from then on."""


def check_stages(stages: dict[str, StageConfig]) -> None:
    """Raise UserError unless the stages follow each other without overlap or gap, the first from 0."""
    before, end = "", 0
    for name, stage in stages.items():
        stage.check(f"stages.{name}")
        fault = "overlaps" if stage.from_tokens < end else "leaves a gap"
        where = f"stages.{before} ends at {end} tokens" if before else "the first stage begins at 0 tokens"
        require(stage.from_tokens == end, f"stages.{name}.from_tokens is {stage.from_tokens}, which {fault}: {where}")
        before, end = name, stage.to_tokens


def check_weights(name: str, weights: dict[str, float]) -> None:
    """Raise UserError if a weight is negative or all are zero."""
    for source, weight in weights.items():
        require(weight >= 0, f"{name}: the weight of {source} is {weight}: it must be at least 0")
    require(not weights or sum(weights.values()) > 0, f"{name}: all weights are 0: one must be greater")


def check_growth(first: int, growth: tuple[BatchGrowth, ...]) -> None:
    """Raise UserError unless the batch, `first` at the start, grows with each change and changes are in order."""
    tokens = 0
    for index, change in enumerate(growth):
        place = f"train.batch_growth[{index}]"
        require(
            change.after_tokens > tokens,
            f"{place}.after_tokens is {change.after_tokens}: it must be greater than {tokens}",
        )
        require(
            change.global_batch_size > first,
            f"{place}.global_batch_size is {change.global_batch_size}: it must be greater than {first}, the one before",
        )
        tokens, first = change.after_tokens, change.global_batch_size
