"""The course of a run as a function of the step: stage, batch, learning rate, router bias rate. No torch.

Stages and batch growth are given in tokens. A step belongs to the stage, and has the batch, that hold where it begins.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass

from moonlight.config.checks import require
from moonlight.config.run import MAX_STEPS, RunConfig
from moonlight.config.schedule import ScheduleConfig, StageConfig


@dataclass(frozen=True)
class StepSchedule:
    """What holds in one step."""

    step: int
    """Counted from 1."""
    stage: str
    """Its name; empty for a recipe without stages."""
    first_sequence: int
    """Number of the step's first sequence, counted from 0 over the whole recipe."""
    global_batch_size: int
    learning_rate: float
    router_bias_update_rate: float

    @property
    def end(self) -> int:
        """Sequences consumed after the step."""
        return self.first_sequence + self.global_batch_size


@dataclass(frozen=True)
class _Span:
    """Steps of one stage and one batch size."""

    first_step: int
    first_sequence: int
    num_steps: int
    stage: str
    global_batch_size: int


class RunSchedule:
    """Every step of a run, without a list of them."""

    def __init__(self, config: RunConfig) -> None:
        """Raises UserError for a run of stages without a step, with too many, or that would stop after its last."""
        self._train_config, self._length = config.train, (length := config.data.sequence_length)
        self._growth = [(0, config.train.global_batch_size)]
        self._growth += [(-(-g.after_tokens // length), g.global_batch_size) for g in config.train.batch_growth]
        self._spans: list[_Span] = []
        self._start_lr: dict[str, float] = {}
        if config.stages:
            self._stages = dict(config.stages)
            only = config.train.only_stage
            lr = 0.0
            for name, stage in self._stages.items():
                self._start_lr[name], lr = lr, stage.end_lr
                if only in ("", name):
                    self._add(name, -(-stage.from_tokens // length), -(-stage.to_tokens // length))
        else:
            assert config.schedule is not None  # Run requires it without stages
            require(
                config.train.train_steps > 0,
                f"train.epochs is {config.train.epochs:g}: how many steps that is follows from the prepared data; "
                "give train.train_steps besides",
            )
            self._add("", 0, None, config.train.train_steps)
            only_span = self._spans[-1]
            tokens = (only_span.first_sequence + only_span.num_steps * only_span.global_batch_size) * length
            self._stages = {"": _whole(config.schedule, tokens)}
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

    def _add(self, stage: str, start: int, end: int | None, num_steps: int = 0) -> None:
        """Append the spans of a stage: to sequence `end`, or else `num_steps` of them."""
        step = 1
        if self._spans:
            last = self._spans[-1]
            step = last.first_step + last.num_steps
            start = last.first_sequence + last.num_steps * last.global_batch_size
        while (start < end) if end is not None else (num_steps > 0):
            place = bisect_right(self._growth, start, key=lambda change: change[0])
            size = self._growth[place - 1][1]
            stops = [-(-(end - start) // size)] if end is not None else [num_steps]
            if place < len(self._growth):
                stops.append(-(-(self._growth[place][0] - start) // size))
            count = min(stops)
            self._spans.append(_Span(step, start, count, stage, size))
            step, start, num_steps = step + count, start + count * size, num_steps - count

    @property
    def first_sequence(self) -> int:
        """Where the run begins: 0, unless it is of a later stage only."""
        return self._spans[0].first_sequence

    @property
    def num_sequences(self) -> int:
        """Sequences that the run consumes."""
        last = self._spans[-1]
        return last.first_sequence + last.num_steps * last.global_batch_size - self.first_sequence

    def steps_by_batch_size(self) -> dict[int, int]:
        """How many steps there are of each batch size."""
        counts = dict.fromkeys(self.batch_sizes, 0)
        for span in self._spans:
            counts[span.global_batch_size] += span.num_steps
        return counts

    def at(self, step: int) -> StepSchedule:
        """What holds in `step`, counted from 1."""
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
        """Of the step after which `consumed` sequences have been seen."""
        stage, start_lr = self._stages[name], self._start_lr[name]
        done = min(consumed * self._length, stage.to_tokens) - stage.from_tokens
        warmup = stage.warmup_steps * self._train_config.batch_at(stage.from_tokens) * self._length
        if done <= warmup:
            return start_lr + (stage.lr - start_lr) * done / warmup
        if stage.decay == "constant":
            return stage.lr
        share = (done - warmup) / (stage.to_tokens - stage.from_tokens - warmup)
        remaining = 1 - share if stage.decay == "linear" else 0.5 * (1 + math.cos(math.pi * share))
        return stage.min_lr + (stage.lr - stage.min_lr) * remaining


def _whole(schedule: ScheduleConfig, tokens: int) -> StageConfig:
    """A schedule as the one stage of a run of so many tokens."""
    return StageConfig(
        lr=schedule.lr,
        min_lr=schedule.min_lr,
        warmup_steps=schedule.warmup_steps,
        decay=schedule.decay,
        router_bias_update_rate=schedule.router_bias_update_rate,
        from_tokens=0,
        to_tokens=tokens,
    )
