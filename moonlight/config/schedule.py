"""What a recipe says about the course of a run: learning rate, stages, growth of the batch."""

from dataclasses import dataclass, field

from moonlight.config.checks import one_of, positive, require


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate: linear warm-up, then a decay to min_lr at the end."""

    lr: float
    """At the end of the warm-up."""
    min_lr: float = 0.0
    """At the end of the decay."""
    warmup_steps: int = 0
    """From 0, or from where the stage before ended. Counted at the batch size of the first of them."""
    decay: str = "cosine"
    router_bias_update_rate: float = 1e-3
    """u in b += u * (sign(e) - mean(sign(e))): Moonlight's rule for balancing without an auxiliary loss."""

    def check(self, section: str) -> None:
        """Raise UserError, naming `section`, for a value that is out of range."""
        positive(section, lr=self.lr)
        one_of(f"{section}.decay", self.decay, ("cosine", "linear", "constant"))
        require(
            0 <= self.min_lr <= self.lr,
            f"{section}.min_lr is {self.min_lr}: it must be from 0 to {section}.lr ({self.lr})",
        )
        require(self.warmup_steps >= 0, f"{section}.warmup_steps is {self.warmup_steps}: it must be at least 0")
        require(
            self.router_bias_update_rate >= 0,
            f"{section}.router_bias_update_rate is {self.router_bias_update_rate}: it must be at least 0",
        )

    @property
    def end_lr(self) -> float:
        """Learning rate of the last step."""
        return self.lr if self.decay == "constant" else self.min_lr


@dataclass(frozen=True, kw_only=True)
class Stage(Schedule):
    """One stage of a run: what holds from one number of consumed tokens to another."""

    from_tokens: int
    """Where the stage before ends; 0 for the first."""
    to_tokens: int
    """The step that reaches it is the stage's last."""
    weights: dict[str, float] = field(default_factory=dict)
    """Shares of `data.sources` in this stage, in any unit; a source that is not named has none. Empty: their own."""

    def check(self, section: str) -> None:
        """As above."""
        super().check(section)
        require(self.from_tokens >= 0, f"{section}.from_tokens is {self.from_tokens}: it must be at least 0")
        require(
            self.to_tokens > self.from_tokens,
            f"{section}.to_tokens is {self.to_tokens}: it must be greater than {section}.from_tokens "
            f"({self.from_tokens})",
        )


@dataclass(frozen=True, kw_only=True)
class BatchGrowth:
    """A larger batch from some point on."""

    after_tokens: int
    global_batch_size: int


def check_stages(stages: dict[str, Stage]) -> None:
    """Raise UserError unless the stages follow one another without overlap or gap, the first from 0 on."""
    before, end = "", 0
    for name, stage in stages.items():
        stage.check(f"stages.{name}")
        fault = "overlaps" if stage.from_tokens < end else "leaves a gap"
        where = f"stages.{before} ends at {end} tokens" if before else "the first stage begins at 0 tokens"
        require(
            stage.from_tokens == end,
            f"stages.{name}.from_tokens is {stage.from_tokens}, which {fault}: {where}",
        )
        before, end = name, stage.to_tokens


def check_weights(name: str, weights: dict[str, float]) -> None:
    """Raise UserError unless no weight is negative and one is not zero."""
    for source, weight in weights.items():
        require(weight >= 0, f"{name}: the weight of {source} is {weight}: it must be at least 0")
    require(not weights or sum(weights.values()) > 0, f"{name}: all weights are 0: one must be greater")


def check_growth(first: int, growth: tuple[BatchGrowth, ...]) -> None:
    """Raise UserError unless the batch, `first` at the start, only grows, later and later."""
    tokens = 0
    for number, change in enumerate(growth):
        place = f"train.batch_growth[{number}]"
        require(
            change.after_tokens > tokens,
            f"{place}.after_tokens is {change.after_tokens}: it must be greater than {tokens}",
        )
        require(
            change.global_batch_size > first,
            f"{place}.global_batch_size is {change.global_batch_size}: it must be greater than {first}, the one before",
        )
        tokens, first = change.after_tokens, change.global_batch_size
