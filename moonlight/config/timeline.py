"""Schedule of a run by step: stage, batch size, learning rate, router bias rate. No torch.

Stages and batch growth are given in tokens. Stage and batch size of a step are those at its first token.
"""

import math
from bisect import bisect_right
from dataclasses import asdict, dataclass

from moonlight.config.checks import require
from moonlight.config.run import MAX_STEPS, RunConfig
from moonlight.config.schedule import StageConfig


@dataclass(frozen=True)
class StepSchedule:
    """Schedule values for one step."""

    step: int
    """Counted from 1."""
    stage: str
    """Name of the stage; empty for a recipe without stages."""
    first_sequence: int
    """Index of the step's first sequence, counted from 0 over all stages of the recipe."""
    global_batch_size: int
    learning_rate: float
    router_bias_update_rate: float

    @property
    def end(self) -> int:
        """Number of sequences consumed after the step, counted over all stages of the recipe."""
        return self.first_sequence + self.global_batch_size


@dataclass(frozen=True)
class _Span:
    """Consecutive steps of one stage and one batch size."""

    first_step: int
    first_sequence: int
    num_steps: int
    stage: str
    global_batch_size: int


class RunSchedule:
    """Schedule of every step of a run, computed from spans of equal steps."""

    def __init__(self, config: RunConfig) -> None:
        """Compute the spans.

        Raises:
            UserError: the run has no step or more than `MAX_STEPS`, `train.stop_at_step` is after the last step, or
                the number of steps depends on `train.epochs`, which `run_folder.resolve_train_steps` must replace.
        """
        self._train_config, self._length = config.train, (length := config.data.sequence_length)
        self._growth = [(0, config.train.global_batch_size)]
        self._growth += [(-(-g.after_tokens // length), g.global_batch_size) for g in config.train.batch_growth]
        self._spans: list[_Span] = []
        self._start_lr: dict[str, float] = {}
        if config.stages:
            self._stages = dict(config.stages)
            only_stage = config.train.only_stage
            lr = 0.0
            for name, stage in self._stages.items():
                self._start_lr[name], lr = lr, stage.end_lr
                if only_stage in ("", name):
                    self._add(name, -(-stage.from_tokens // length), -(-stage.to_tokens // length))
        else:
            assert config.schedule is not None  # RunConfig requires it without stages
            require(
                config.train.train_steps > 0,
                f"train.epochs is {config.train.epochs:g}: the number of steps depends on the prepared data; "
                "also set train.train_steps",
            )
            self._add("", 0, None, config.train.train_steps)
            only_span = self._spans[-1]
            tokens = (only_span.first_sequence + only_span.num_steps * only_span.global_batch_size) * length
            self._stages = {"": StageConfig(**asdict(config.schedule), from_tokens=0, to_tokens=tokens)}
            self._start_lr[""] = 0.0
        require(bool(self._spans), f"train.only_stage is {config.train.only_stage!r}: no step begins in it")
        last = self._spans[-1]
        self.num_steps = last.first_step + last.num_steps - 1
        require(
            self.num_steps <= MAX_STEPS, f"the stages have {self.num_steps} steps: at most {MAX_STEPS} are accepted"
        )
        require(
            config.train.stop_at_step <= self.num_steps,
            f"train.stop_at_step is {config.train.stop_at_step}: at most {self.num_steps}, the steps of the run",
        )
        self.batch_sizes = sorted({span.global_batch_size for span in self._spans})

    def _add(self, stage: str, start: int, stop: int | None, num_steps: int = 0) -> None:
        """Append the spans of a stage, from sequence `start` until `stop` or, if that is None, for `num_steps` steps.

        If spans exist, the stage starts where the last one stops instead.
        """
        step = 1
        if self._spans:
            last = self._spans[-1]
            step = last.first_step + last.num_steps
            start = last.first_sequence + last.num_steps * last.global_batch_size
        while (start < stop) if stop is not None else (num_steps > 0):
            index = bisect_right(self._growth, start, key=lambda change: change[0])
            size = self._growth[index - 1][1]
            limits = [-(-(stop - start) // size)] if stop is not None else [num_steps]
            if index < len(self._growth):
                limits.append(-(-(self._growth[index][0] - start) // size))
            count = min(limits)
            self._spans.append(_Span(step, start, count, stage, size))
            step, start, num_steps = step + count, start + count * size, num_steps - count

    @property
    def first_sequence(self) -> int:
        """Index of the run's first sequence: 0, unless `train.only_stage` is a later stage."""
        return self._spans[0].first_sequence

    @property
    def num_sequences(self) -> int:
        """Number of sequences that the run consumes."""
        last = self._spans[-1]
        return last.first_sequence + last.num_steps * last.global_batch_size - self.first_sequence

    def steps_by_batch_size(self) -> dict[int, int]:
        """Return the number of steps by batch size."""
        counts = dict.fromkeys(self.batch_sizes, 0)
        for span in self._spans:
            counts[span.global_batch_size] += span.num_steps
        return counts

    def at(self, step: int) -> StepSchedule:
        """Return the schedule values of `step`, counted from 1."""
        assert 1 <= step <= self.num_steps, (step, self.num_steps)
        span = self._spans[bisect_right(self._spans, step, key=lambda span: span.first_step) - 1]
        first = span.first_sequence + (step - span.first_step) * span.global_batch_size
        stage = self._stages[span.stage]
        return StepSchedule(
            step=step,
            stage=span.stage,
            first_sequence=first,
            global_batch_size=span.global_batch_size,
            learning_rate=self._learning_rate(span.stage, first + span.global_batch_size),
            router_bias_update_rate=stage.router_bias_update_rate,
        )

    def _learning_rate(self, name: str, consumed: int) -> float:
        """Return the learning rate of the step after which `consumed` sequences have been consumed."""
        stage, start_lr = self._stages[name], self._start_lr[name]
        done = min(consumed * self._length, stage.to_tokens) - stage.from_tokens
        warmup = stage.warmup_steps * self._train_config.batch_at(stage.from_tokens) * self._length
        if done <= warmup:
            return start_lr + (stage.lr - start_lr) * done / warmup
        if stage.decay == "constant":
            return stage.lr
        fraction = (done - warmup) / (stage.to_tokens - stage.from_tokens - warmup)
        remaining = 1 - fraction if stage.decay == "linear" else 0.5 * (1 + math.cos(math.pi * fraction))
        return stage.min_lr + (stage.lr - stage.min_lr) * remaining
