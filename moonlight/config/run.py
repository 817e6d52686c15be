"""The recipe: every setting of a run, as frozen dataclasses with units in their names.

`RunConfig` is a recipe file; each section has its class in the file of its name. A section's own checks are in
its `__post_init__`, checks across sections in that of `RunConfig`. All raise `UserError`.
"""

import math
from dataclasses import dataclass, field
from operator import attrgetter

from moonlight.config.checks import require
from moonlight.config.data import DataConfig
from moonlight.config.model import ModelConfig
from moonlight.config.monitor import MonitorConfig
from moonlight.config.optimizer import OptimizerConfig
from moonlight.config.parallel import ParallelConfig
from moonlight.config.pipeline import check_pipeline
from moonlight.config.schedule import ScheduleConfig, StageConfig, check_stages, check_weights
from moonlight.config.train import TrainConfig

MAX_STEPS = 99_999_999
"""Checkpoint folders are named by steps of eight digits, so that their names sort."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A recipe."""

    name: str
    """Name of the run's folder, runs_folder/name, which holds all its output."""
    runs_folder: str = "runs"
    """Folder of all runs."""
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig | None = None
    """Learning rate over train.train_steps. Give this or `stages`."""
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """Stages in order, each under a name of your own."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        model_config, parallel, train_config = self.model, self.parallel, self.train
        require(
            bool(self.name) and "/" not in self.name and self.name not in (".", ".."),
            f"name is {self.name!r}: it must be one folder name",
        )
        self._check_divisible()
        check_pipeline(
            model_config.num_hidden_layers, parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
        )
        require(
            self.data.sequence_length <= model_config.max_position_embeddings,
            f"data.sequence_length is {self.data.sequence_length}: at most model.max_position_embeddings "
            f"({model_config.max_position_embeddings}) is accepted",
        )
        require(
            self.optimizer.master_weights == "float32" or train_config.dtype == "bfloat16",
            f"optimizer.master_weights is {self.optimizer.master_weights!r}: it needs train.dtype bfloat16 "
            f"({train_config.dtype} weights are their own masters)",
        )
        require(
            self.optimizer.gradient_dtype == "float32" or train_config.dtype == "bfloat16",
            f"optimizer.gradient_dtype is {self.optimizer.gradient_dtype!r}: it needs train.dtype bfloat16 "
            f"(gradients of {train_config.dtype} weights are {train_config.dtype})",
        )
        require(
            not self.data.conversations or bool(train_config.initial_checkpoint),
            "train.initial_checkpoint is missing: tuning on conversations starts from the weights of a checkpoint",
        )
        require(
            train_config.epochs == 0
            or (self.data.conversations and bool(self.data.path) and not train_config.batch_growth),
            f"train.epochs is {train_config.epochs:g}: it is for conversations from one data.path, at one batch size",
        )
        self._check_schedule()

    def _check_divisible(self) -> None:
        """Check that tensor and expert parallelism divide every size that they split."""
        for product, divisor_key in (
            ("model.num_attention_heads", "parallel.tensor_parallel_size"),
            ("model.intermediate_size", "parallel.tensor_parallel_size"),
            ("model.vocab_size", "parallel.tensor_parallel_size"),
            ("model.moe_intermediate_size x model.num_shared_experts", "parallel.tensor_parallel_size"),
            ("data.sequence_length", "parallel.tensor_parallel_size"),
            ("model.moe_intermediate_size", "parallel.expert_tensor_parallel_size"),
            ("model.num_experts", "parallel.expert_parallel_size"),
        ):
            value = math.prod(attrgetter(key)(self) for key in product.split(" x "))
            divisor = attrgetter(divisor_key)(self)
            require(value % divisor == 0, f"{product} is {value}: it must be a multiple of {divisor_key} ({divisor})")

    def _check_schedule(self) -> None:
        schedule, train_config = self.schedule, self.train
        require(
            (schedule is None) == bool(self.stages),
            "schedule and stages are both " + ("given" if schedule else "missing") + ": give one of them",
        )
        if schedule:
            schedule.check("schedule")
            require(
                train_config.epochs > 0 or train_config.train_steps > 0,
                f"train.train_steps is {train_config.train_steps}: it must be greater than 0",
            )
            require(
                train_config.train_steps <= MAX_STEPS,
                f"train.train_steps is {train_config.train_steps}: at most {MAX_STEPS} is accepted",
            )
            counted = train_config.train_steps > 0  # epochs become steps once the data is known
            require(
                not counted or schedule.warmup_steps <= train_config.train_steps,
                f"schedule.warmup_steps is {schedule.warmup_steps}: it must be at most train.train_steps "
                f"({train_config.train_steps})",
            )
            require(
                not counted or train_config.stop_at_step <= train_config.train_steps,
                f"train.stop_at_step is {train_config.stop_at_step}: at most train.train_steps "
                f"({train_config.train_steps}) is accepted",
            )
        else:
            require(
                train_config.train_steps == 0,
                f"train.train_steps is {train_config.train_steps}: leave it out, because stages end at a number "
                "of tokens",
            )
            check_stages(self.stages)
            for name, stage in self.stages.items():
                tokens = stage.to_tokens - stage.from_tokens
                most = tokens // (train_config.batch_at(stage.from_tokens) * self.data.sequence_length)
                require(
                    stage.warmup_steps <= most,
                    f"stages.{name}.warmup_steps is {stage.warmup_steps}: the stage has {most} steps",
                )
        require(
            not train_config.only_stage or train_config.only_stage in self.stages,
            f"train.only_stage is {train_config.only_stage!r}: the stages are {', '.join(self.stages) or 'none'}",
        )
        for name, stage in self.stages.items():
            if stage.weights:
                check_weights(f"stages.{name}.weights", stage.weights)
            for source in stage.weights:
                require(
                    source in self.data.sources,
                    f"stages.{name}.weights names {source}: the sources are {', '.join(self.data.sources) or 'none'}",
                )

    def check_batches(self, world_size: int) -> None:
        """Raise UserError if a batch of the run cannot be split among `world_size` processes."""
        train_config, parallel = self.train, self.parallel
        per_pass = train_config.micro_batch_size * parallel.data_parallel_size(world_size)
        sizes = {"train.global_batch_size": train_config.global_batch_size}
        for index, change in enumerate(train_config.batch_growth):
            sizes[f"train.batch_growth[{index}].global_batch_size"] = change.global_batch_size
        for name, size in sizes.items():
            require(
                size % per_pass == 0,
                f"{name} is {size}: it must be a multiple of train.micro_batch_size x data-parallel size = {per_pass}",
            )
            count = size // per_pass
            require(
                parallel.virtual_pipeline_parallel_size == 1 or count % parallel.pipeline_parallel_size == 0,
                f"{name} is {size}: interleaved pipelines need micro-batches ({count}) in multiples of "
                f"parallel.pipeline_parallel_size ({parallel.pipeline_parallel_size})",
            )
