"""The recipe: every setting of a run, as frozen dataclasses with units in their names.

`Run` is the whole of a recipe file. Checks that need only one section live in its `__post_init__`; checks across
sections in `Run.__post_init__`. All raise `UserError`. This module imports neither torch nor Megatron.
"""

from dataclasses import dataclass, field

from moonlight.config.checks import one_of, positive, require
from moonlight.config.data import Data as Data
from moonlight.config.data import Source as Source
from moonlight.config.model import Model
from moonlight.config.monitor import Monitor
from moonlight.config.optimizer import Optimizer
from moonlight.config.pipeline import check_pipeline
from moonlight.config.schedule import BatchGrowth, Schedule, Stage, check_growth, check_stages, check_weights

MAX_STEPS = 99_999_999
"""Checkpoint folders are named by steps of eight digits, so that their names sort."""
RECOMPUTE_MODULES = ("layernorm", "mlp_act", "mla_up_proj", "layer")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the model is cut. The data-parallel size is what remains of the world."""

    num_processes: int = 1
    """Local processes that `moonlight pretrain` starts when torchrun has not."""
    tensor_parallel_size: int = 1
    """Sequence parallelism is always on with it: Megatron's mixture of experts needs it."""
    pipeline_parallel_size: int = 1
    virtual_pipeline_parallel_size: int = 1
    """Model chunks per pipeline rank; more than 1 interleaves them."""
    expert_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    context_parallel_size: int = 1
    bucket_size: int = 0
    """Gradient elements that data-parallel ranks exchange at once, while the backward pass goes on; 0 chooses."""

    def __post_init__(self) -> None:
        positive(
            "parallel",
            num_processes=self.num_processes,
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            virtual_pipeline_parallel_size=self.virtual_pipeline_parallel_size,
            expert_parallel_size=self.expert_parallel_size,
            expert_tensor_parallel_size=self.expert_tensor_parallel_size,
        )
        require(self.bucket_size >= 0, f"parallel.bucket_size is {self.bucket_size}: it must be at least 0")
        require(
            self.context_parallel_size == 1,
            f"parallel.context_parallel_size is {self.context_parallel_size}: only 1 is supported yet",
        )
        one_of(
            "parallel.expert_tensor_parallel_size",
            self.expert_tensor_parallel_size,
            tuple(dict.fromkeys((1, self.tensor_parallel_size))),
        )
        require(
            self.virtual_pipeline_parallel_size == 1 or self.pipeline_parallel_size > 1,
            f"parallel.virtual_pipeline_parallel_size is {self.virtual_pipeline_parallel_size}: more than 1 needs "
            "parallel.pipeline_parallel_size above 1",
        )

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel size on `world_size` processes; raises UserError if the layout does not divide them."""
        for name, model_size in (
            (
                "tensor_parallel_size x pipeline_parallel_size",
                self.tensor_parallel_size * self.pipeline_parallel_size,
            ),
            (
                "expert_tensor_parallel_size x expert_parallel_size x pipeline_parallel_size",
                self.expert_tensor_parallel_size * self.expert_parallel_size * self.pipeline_parallel_size,
            ),
        ):
            require(
                world_size % model_size == 0,
                f"the world has {world_size} processes: {name} = {model_size} does not divide it",
            )
        return world_size // (self.tensor_parallel_size * self.pipeline_parallel_size)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Batch, length, precision, and how often to look, save and validate."""

    train_steps: int = 0
    """Of a recipe with a schedule; one with stages says where they end in tokens."""
    epochs: float = 0.0
    """Of conversations, in place of train_steps: how often all are seen. `moonlight sft` makes steps of it."""
    only_stage: str = ""
    """Train this one of the stages alone, from train.initial_checkpoint, on the data it has in the whole run."""
    global_batch_size: int
    """Sequences per optimizer step over all processes."""
    batch_growth: tuple[BatchGrowth, ...] = ()
    """Larger batches later on, such as [{after_tokens: 200_000_000_000, global_batch_size: 4096}]."""
    micro_batch_size: int
    """Sequences per forward pass of one process."""
    seed: int = 1234
    dtype: str = "float32"
    """Precision of weights and activations in the model; master weights are float32, gradient sums unless
    optimizer.gradient_dtype says otherwise."""
    recompute_modules: tuple[str, ...] = ()
    """What the backward pass makes again instead of keeping it: layernorm (outputs of the norms before attention and
    MLP), mlp_act (of dense and shared SwiGLU; routed experts always make theirs again), mla_up_proj (queries, keys and
    values), or layer (everything but a layer's input, instead of all the others)."""
    fp32_residual_connection: bool = False
    """Keep the residual stream in float32 when dtype is bfloat16."""
    threads_per_process: int = 0
    """CPU threads of each process; 0 shares the machine's cores among the local processes."""
    validate_every_steps: int = 100
    validation_sequences: int = 0
    """Held-out sequences of each source, the first ones, that every validation takes; 0 takes all. After the last step
    all are taken once."""
    save_every_steps: int = 100
    max_skipped_steps_in_a_row: int = 10
    """Training stops with an error after this many steps in a row that were skipped, because loss or gradient was not
    finite or, with spike_policy=skip, because of their loss."""
    initial_checkpoint: str = ""
    """Checkpoint (or run folder: its newest) whose weights a new run starts from, at step 0 and with momenta of zero:
    one of any layout, or one that `moonlight import` or `moonlight average` made. Empty: random weights."""
    stop_at_step: int = 0
    """Save and stop after this step, without changing the schedule; 0 goes on to the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; 0 keeps all."""
    save_every_minutes: float = 0.0
    """Save also when so many minutes have passed since the last save; 0: only by steps."""
    grace_seconds: float = 25.0
    """On SIGTERM a run saves after its step, and the validation after it, and stops; what has not ended after so many
    seconds is left. torchrun and Kubernetes kill 30 s after SIGTERM unless they are told otherwise."""
    hang_timeout_seconds: float = 1800.0
    """A process that makes no progress (no step, validation pass or save) for so long ends with the stacks of all its
    threads, and its peers with it. Twice as long until the first step has ended."""
    max_restarts: int = 0
    """How often `moonlight pretrain` starts its local processes again after one of them was killed, crashed or hung.
    torchrun has --max-restarts instead."""
    spike_policy: str = "none"
    """What a loss spike does: none (a warning), skip (that step changes nothing), rollback (go back to a checkpoint and
    pass over the data up to and including the spike; if there is none so old, skip)."""
    spike_threshold: float = 10.0
    """A step whose loss/spike_score is greater is a spike."""
    spike_window: int = 64
    """Steps before, with whose losses a loss is compared: score = (loss - median) / (1.4826 MAD + 0.01)."""
    rollback_steps: int = 100
    """A rollback goes to the newest checkpoint that is at least so many steps before the spike."""
    max_rollbacks_in_a_row: int = 3
    """Training stops with an error if the next spike comes before the run got past the last one so many times."""
    keep_every_steps: int = 0
    """Checkpoints after multiples of so many steps are kept besides; 0: none."""
    async_save: bool = True
    """Write checkpoints while training goes on, from a copy in host memory (a checkpoint's size, spread over all
    processes). False stops training until each is on the disk."""

    def __post_init__(self) -> None:
        positive(
            "train",
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            validate_every_steps=self.validate_every_steps,
            save_every_steps=self.save_every_steps,
            max_skipped_steps_in_a_row=self.max_skipped_steps_in_a_row,
            grace_seconds=self.grace_seconds,
            hang_timeout_seconds=self.hang_timeout_seconds,
            spike_threshold=self.spike_threshold,
            spike_window=self.spike_window,
            rollback_steps=self.rollback_steps,
            max_rollbacks_in_a_row=self.max_rollbacks_in_a_row,
        )
        one_of("train.spike_policy", self.spike_policy, ("none", "skip", "rollback"))
        back = (self.keep_checkpoints - 1) * self.save_every_steps
        require(
            self.spike_policy != "rollback" or self.keep_checkpoints == 0 or back >= self.rollback_steps,
            f"train.rollback_steps is {self.rollback_steps}: with train.keep_checkpoints={self.keep_checkpoints} and "
            f"train.save_every_steps={self.save_every_steps} it must be at most {back}, or no checkpoint is old enough",
        )
        check_growth(self.global_batch_size, self.batch_growth)
        one_of("train.dtype", self.dtype, ("float32", "bfloat16"))
        for module in self.recompute_modules:
            require(
                module in RECOMPUTE_MODULES,
                f"train.recompute_modules names {module!r}: accepted are {', '.join(map(repr, RECOMPUTE_MODULES))}",
            )
        require(
            self.recompute_modules.count("layer") == 0 or len(self.recompute_modules) == 1,
            f"train.recompute_modules is {', '.join(self.recompute_modules)}: layer includes all others, so it stands "
            "alone",
        )
        for name in (
            "train_steps",
            "epochs",
            "seed",
            "threads_per_process",
            "validation_sequences",
            "stop_at_step",
            "keep_checkpoints",
            "save_every_minutes",
            "max_restarts",
            "keep_every_steps",
        ):
            value = getattr(self, name)
            require(value >= 0, f"train.{name} is {value}: it must be at least 0")

    def batch_at(self, tokens: int) -> int:
        """Global batch size of the step that begins after `tokens`."""
        grown = [change.global_batch_size for change in self.batch_growth if change.after_tokens <= tokens]
        return grown[-1] if grown else self.global_batch_size


@dataclass(frozen=True, kw_only=True)
class Run:
    """A whole recipe."""

    name: str
    """Everything the run writes lies under runs_folder/name."""
    runs_folder: str = "runs"
    model: Model
    data: Data
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule | None = None
    """Learning rate over train.train_steps. Or else `stages`."""
    stages: dict[str, Stage] = field(default_factory=dict)
    """Stages in their order, under names of your own."""
    parallel: Parallel = field(default_factory=Parallel)
    train: Train
    monitor: Monitor = field(default_factory=Monitor)

    def __post_init__(self) -> None:
        model, parallel, train = self.model, self.parallel, self.train
        require(
            bool(self.name) and "/" not in self.name and self.name not in (".", ".."),
            f"name is {self.name!r}: it must be one folder name",
        )
        tp, pp, vpp = (
            parallel.tensor_parallel_size,
            parallel.pipeline_parallel_size,
            parallel.virtual_pipeline_parallel_size,
        )
        for label, value, divisor_label, divisor in (
            ("model.num_attention_heads", model.num_attention_heads, "parallel.tensor_parallel_size", tp),
            ("model.intermediate_size", model.intermediate_size, "parallel.tensor_parallel_size", tp),
            ("model.vocab_size", model.vocab_size, "parallel.tensor_parallel_size", tp),
            (
                "model.moe_intermediate_size x model.num_shared_experts",
                model.moe_intermediate_size * model.num_shared_experts,
                "parallel.tensor_parallel_size",
                tp,
            ),
            ("data.sequence_length", self.data.sequence_length, "parallel.tensor_parallel_size", tp),
            (
                "model.moe_intermediate_size",
                model.moe_intermediate_size,
                "parallel.expert_tensor_parallel_size",
                parallel.expert_tensor_parallel_size,
            ),
            (
                "model.num_experts",
                model.num_experts,
                "parallel.expert_parallel_size",
                parallel.expert_parallel_size,
            ),
        ):
            require(
                value % divisor == 0,
                f"{label} is {value}: it must be a multiple of {divisor_label} ({divisor})",
            )
        check_pipeline(model.num_hidden_layers, pp, vpp)
        require(
            self.data.sequence_length <= model.max_position_embeddings,
            f"data.sequence_length is {self.data.sequence_length}: at most model.max_position_embeddings "
            f"({model.max_position_embeddings}) is accepted",
        )
        require(
            self.optimizer.master_weights == "float32" or train.dtype == "bfloat16",
            f"optimizer.master_weights is {self.optimizer.master_weights!r}: it needs train.dtype bfloat16 "
            f"({train.dtype} weights are their own masters)",
        )
        require(
            self.optimizer.gradient_dtype == "float32" or train.dtype == "bfloat16",
            f"optimizer.gradient_dtype is {self.optimizer.gradient_dtype!r}: it needs train.dtype bfloat16 "
            f"(gradients of {train.dtype} weights are {train.dtype})",
        )
        require(
            not self.data.conversations or bool(train.initial_checkpoint),
            "train.initial_checkpoint is missing: tuning on conversations begins with the weights of a checkpoint",
        )
        require(
            train.epochs == 0 or (self.data.conversations and bool(self.data.path) and not train.batch_growth),
            f"train.epochs is {train.epochs:g}: it is for conversations from one data.path, at one batch size",
        )
        self._check_course()

    def _check_course(self) -> None:
        schedule, train = self.schedule, self.train
        require(
            (schedule is None) == bool(self.stages),
            "schedule and stages are both " + ("given" if schedule else "missing") + ": give one of them",
        )
        if schedule:
            schedule.check("schedule")
            if train.epochs == 0:
                positive("train", train_steps=train.train_steps)
            require(
                train.train_steps <= MAX_STEPS,
                f"train.train_steps is {train.train_steps}: at most {MAX_STEPS} is accepted",
            )
            counted = train.train_steps > 0  # epochs become steps when the data is known
            require(
                not counted or schedule.warmup_steps <= train.train_steps,
                f"schedule.warmup_steps is {schedule.warmup_steps}: it must be at most train.train_steps "
                f"({train.train_steps})",
            )
            require(
                not counted or train.stop_at_step <= train.train_steps,
                f"train.stop_at_step is {train.stop_at_step}: at most train.train_steps ({train.train_steps}) is "
                "accepted",
            )
        else:
            require(
                train.train_steps == 0,
                f"train.train_steps is {train.train_steps}: leave it out, because stages say where they end in tokens",
            )
            check_stages(self.stages)
            for name, stage in self.stages.items():
                tokens = stage.to_tokens - stage.from_tokens
                most = tokens // (train.batch_at(stage.from_tokens) * self.data.sequence_length)
                require(
                    stage.warmup_steps <= most,
                    f"stages.{name}.warmup_steps is {stage.warmup_steps}: the stage has {most} steps",
                )
        require(
            not train.only_stage or train.only_stage in self.stages,
            f"train.only_stage is {train.only_stage!r}: the stages are {', '.join(self.stages) or 'none'}",
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
        train, parallel = self.train, self.parallel
        per_pass = train.micro_batch_size * parallel.data_parallel_size(world_size)
        sizes = {"train.global_batch_size": train.global_batch_size}
        for number, change in enumerate(train.batch_growth):
            sizes[f"train.batch_growth[{number}].global_batch_size"] = change.global_batch_size
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
