"""The train section of a recipe."""

from dataclasses import dataclass
from typing import Literal

from moonlight.config.checks import NonNegative, Positive, check_fields, require
from moonlight.config.schedule import BatchGrowth, check_growth

RecomputeModule = Literal["layernorm", "mlp_act", "mla_up_proj", "layer"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Batch, length, precision, and how often the run validates and saves."""

    train_steps: NonNegative[int] = 0
    """Optimizer steps of a recipe with a schedule. Stages end at a number of tokens instead."""
    epochs: NonNegative[float] = 0.0
    """Passes over all conversations, instead of train_steps; `moonlight sft` converts them to steps."""
    only_stage: str = ""
    """Train only this stage, from train.initial_checkpoint, on the data that it has in the full run."""
    global_batch_size: Positive[int]
    """Sequences per optimizer step over all processes."""
    batch_growth: tuple[BatchGrowth, ...] = ()
    """Larger batches later in the run, such as [{after_tokens: 200_000_000_000, global_batch_size: 4096}]."""
    micro_batch_size: Positive[int]
    """Sequences per forward pass of one process."""
    seed: NonNegative[int] = 1234
    """Seed of initial weights and data order."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and activations in the model. Master weights are float32; gradient sums have
    optimizer.gradient_dtype."""
    recompute_modules: tuple[RecomputeModule, ...] = ()
    """Activations that the backward pass recomputes: layernorm (outputs of the norms before attention and
    MLP), mlp_act (of dense and shared SwiGLU; routed experts always recompute theirs), mla_up_proj (queries, keys and
    values), or layer (everything but a layer's input, instead of all others)."""
    fp32_residual_connection: bool = False
    """Keep the residual stream in float32 when dtype is bfloat16."""
    threads_per_process: NonNegative[int] = 0
    """CPU threads of each process. 0 divides the machine's cores among the local processes."""
    validate_every_steps: Positive[int] = 100
    """Steps between validations on held-out text."""
    validation_sequences: NonNegative[int] = 0
    """Held-out sequences of each source, the first ones, in every validation; 0 takes all. The validation after the
    last step always takes all."""
    save_every_steps: Positive[int] = 100
    """Steps between checkpoints."""
    max_skipped_steps_in_a_row: Positive[int] = 10
    """Training stops with an error after this many consecutive skipped steps. A step is skipped if its loss or
    gradient is not finite or, with spike_policy=skip, if its loss spikes."""
    initial_checkpoint: str = ""
    """Checkpoint, or run folder (its newest one), whose weights a new run starts from, at step 0 with zero momenta. Any
    layout may have written it, or `moonlight import` or `moonlight average`. Empty: random weights."""
    stop_at_step: NonNegative[int] = 0
    """Save and stop after this step, without changing the schedule; 0 runs to the end."""
    keep_checkpoints: NonNegative[int] = 2
    """Newest checkpoints kept; 0 keeps all."""
    save_every_minutes: NonNegative[float] = 0.0
    """Also save when this many minutes have passed since the last save; 0: by steps only."""
    grace_seconds: Positive[float] = 25.0
    """On SIGTERM a run saves after its step and that step's validation, and stops. What has not ended after this time
    is abandoned. torchrun and Kubernetes kill 30 s after SIGTERM by default."""
    hang_timeout_seconds: Positive[float] = 1800.0
    """A process that makes no progress (step, validation pass or save) for this long ends with the stacks of all its
    threads, and its peers with it. Twice as long until the first step has ended."""
    max_restarts: NonNegative[int] = 0
    """How often `moonlight pretrain` restarts its local processes after one was killed, crashed or hung. torchrun has
    --max-restarts instead."""
    spike_policy: Literal["none", "skip", "rollback"] = "none"
    """Action on a loss spike: none (a warning), skip (that step changes nothing), rollback (return to a checkpoint and
    skip the data up to and including the spike; if no checkpoint is old enough, skip)."""
    spike_threshold: Positive[float] = 10.0
    """A step whose loss/spike_score is greater is a spike."""
    spike_window: Positive[int] = 64
    """Earlier steps whose losses a loss is compared with: score = (loss - median) / (1.4826 MAD + 0.01)."""
    rollback_steps: Positive[int] = 100
    """A rollback goes to the newest checkpoint that is at least this many steps before the spike."""
    max_rollbacks_in_a_row: Positive[int] = 3
    """Training stops with an error if the next spike comes before the run got past the last one this many times."""
    keep_every_steps: NonNegative[int] = 0
    """Also keep checkpoints after multiples of this many steps; 0: none."""
    async_save: bool = True
    """Write checkpoints during training, from a copy in host memory (a checkpoint's size, divided among all
    processes). False stops training until each is on disk."""

    def __post_init__(self) -> None:
        check_fields("train", self)
        back = (self.keep_checkpoints - 1) * self.save_every_steps
        require(
            self.spike_policy != "rollback" or self.keep_checkpoints == 0 or back >= self.rollback_steps,
            f"train.rollback_steps is {self.rollback_steps}: with train.keep_checkpoints={self.keep_checkpoints} and "
            f"train.save_every_steps={self.save_every_steps} it must be at most {back}, or no checkpoint is old enough",
        )
        check_growth(self.global_batch_size, self.batch_growth)
        require(
            self.recompute_modules.count("layer") == 0 or len(self.recompute_modules) == 1,
            f"train.recompute_modules is {', '.join(self.recompute_modules)}: layer includes all others, so it must be "
            "the only one",
        )

    def batch_at(self, tokens: int) -> int:
        """Return the global batch size of the step that begins after `tokens`."""
        sizes = [change.global_batch_size for change in self.batch_growth if change.after_tokens <= tokens]
        return sizes[-1] if sizes else self.global_batch_size
