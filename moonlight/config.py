"""The recipe: every setting of a run, as frozen dataclasses with units in their names.

`Run` is the whole of a recipe file. Checks that need only one section live in its `__post_init__`; checks across
sections in `Run.__post_init__`. All raise `UserError`. This module imports neither torch nor Megatron.
"""

from dataclasses import dataclass, field

from moonlight.errors import UserError

MAX_STEPS = 99_999_999
"""Checkpoint folders are named by steps of eight digits, so that their names sort."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _positive(section: str, **values: float) -> None:
    for name, value in values.items():
        _require(value > 0, f"{section}.{name} is {value}: it must be greater than 0")


def _one_of(name: str, value: object, accepted: tuple[object, ...]) -> None:
    _require(value in accepted, f"{name} is {value!r}: accepted are {', '.join(map(repr, accepted))}")


@dataclass(frozen=True, kw_only=True)
class Model:
    """Architecture, named as in a DeepSeek-V3 `config.json` wherever that file has a name for it."""

    vocab_size: int
    """Rows of embedding and head. May exceed the tokenizer's ids; never the other way round."""
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None = None
    """None: one direct query projection (Moonlight). A number: down-projection, norm, up-projection."""
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    intermediate_size: int
    """Width of the dense SwiGLU of the first layers."""
    moe_intermediate_size: int
    """Width of one routed expert; the shared experts are one SwiGLU of num_shared_experts times this."""
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int = 2
    first_k_dense_replace: int = 1
    num_expert_groups: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 2.446
    aux_loss_alpha: float = 0.001
    """Coefficient of the sequence-wise auxiliary balance loss (DeepSeek-V3, eq. 17)."""
    rms_norm_eps: float = 1e-5
    rope_theta: float = 50000.0
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        _positive(
            "model",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            kv_lora_rank=self.kv_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
            intermediate_size=self.intermediate_size,
            moe_intermediate_size=self.moe_intermediate_size,
            num_experts=self.num_experts,
            num_experts_per_tok=self.num_experts_per_tok,
            num_shared_experts=self.num_shared_experts,
            num_expert_groups=self.num_expert_groups,
            topk_group=self.topk_group,
            routed_scaling_factor=self.routed_scaling_factor,
            rms_norm_eps=self.rms_norm_eps,
            rope_theta=self.rope_theta,
            max_position_embeddings=self.max_position_embeddings,
            initializer_range=self.initializer_range,
        )
        _require(
            self.q_lora_rank is None or self.q_lora_rank > 0,
            f"model.q_lora_rank is {self.q_lora_rank}: it must be greater than 0, or null for a direct projection",
        )
        _require(
            self.qk_rope_head_dim % 2 == 0,
            f"model.qk_rope_head_dim is {self.qk_rope_head_dim}: it must be even",
        )
        _require(
            1 <= self.first_k_dense_replace < self.num_hidden_layers,
            f"model.first_k_dense_replace is {self.first_k_dense_replace}: it must be from 1 to "
            f"{self.num_hidden_layers - 1}, so that dense layers come first and at least one layer has experts",
        )
        _require(
            self.num_experts % self.num_expert_groups == 0,
            f"model.num_experts is {self.num_experts}: it must be a multiple of model.num_expert_groups "
            f"({self.num_expert_groups})",
        )
        _require(
            self.topk_group <= self.num_expert_groups,
            f"model.topk_group is {self.topk_group}: it must be at most model.num_expert_groups "
            f"({self.num_expert_groups})",
        )
        selectable = self.num_experts // self.num_expert_groups * self.topk_group
        _require(
            self.num_experts_per_tok <= selectable,
            f"model.num_experts_per_tok is {self.num_experts_per_tok}: at most {selectable} experts can be chosen",
        )
        _require(
            self.num_expert_groups == 1 or self.num_experts // self.num_expert_groups >= 2,
            f"model.num_expert_groups is {self.num_expert_groups}: a group needs at least 2 experts",
        )
        _require(self.aux_loss_alpha >= 0, f"model.aux_loss_alpha is {self.aux_loss_alpha}: it must be at least 0")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the tokens come from. Both folders are made by `moonlight tokenizer train` and `moonlight data prepare`."""

    path: str
    """Folder with train.bin/.idx, validation.bin/.idx and manifest.json."""
    tokenizer: str
    """Folder with the tokenizer whose checksum the manifest names."""
    sequence_length: int

    def __post_init__(self) -> None:
        _positive("data", sequence_length=self.sequence_length)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Muon for matrices, AdamW for embedding, head and norms, one learning rate for both (arXiv 2502.16982, 2.2)."""

    name: str = "muon"
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    num_newton_schulz_steps: int = 5
    coefficients: str = "moonlight"
    rms_match: float = 0.2
    """Update scale c in c * sqrt(max(rows, columns)): the RMS that AdamW's update would have."""
    newton_schulz_dtype: str = "bfloat16"
    adamw_beta1: float = 0.9
    adamw_beta2: float = 0.95
    adamw_eps: float = 1e-8
    clip_grad_norm: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        _one_of("optimizer.name", self.name, ("muon", "adamw"))
        _one_of("optimizer.newton_schulz_dtype", self.newton_schulz_dtype, ("float32", "bfloat16"))
        _one_of("optimizer.coefficients", self.coefficients, ("moonlight", "polar_express", "deepseekv4"))
        _positive(
            "optimizer",
            num_newton_schulz_steps=self.num_newton_schulz_steps,
            rms_match=self.rms_match,
            adamw_eps=self.adamw_eps,
        )
        for name in ("momentum", "adamw_beta1", "adamw_beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name} is {value}: it must be at least 0 and less than 1")
        for name in ("weight_decay", "clip_grad_norm"):
            value = getattr(self, name)
            _require(value >= 0, f"optimizer.{name} is {value}: it must be at least 0")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate: linear warm-up, then cosine or linear decay to min_lr at the last step."""

    lr: float
    min_lr: float = 0.0
    warmup_steps: int = 0
    decay: str = "cosine"
    router_bias_update_rate: float = 1e-3
    """u in b += u * (sign(e) - mean(sign(e))): Moonlight's rule for balancing without an auxiliary loss."""

    def __post_init__(self) -> None:
        _positive("schedule", lr=self.lr)
        _one_of("schedule.decay", self.decay, ("cosine", "linear", "constant"))
        _require(
            0 <= self.min_lr <= self.lr,
            f"schedule.min_lr is {self.min_lr}: it must be from 0 to schedule.lr ({self.lr})",
        )
        _require(self.warmup_steps >= 0, f"schedule.warmup_steps is {self.warmup_steps}: it must be at least 0")
        _require(
            self.router_bias_update_rate >= 0,
            f"schedule.router_bias_update_rate is {self.router_bias_update_rate}: it must be at least 0",
        )


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

    def __post_init__(self) -> None:
        _positive(
            "parallel",
            num_processes=self.num_processes,
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            virtual_pipeline_parallel_size=self.virtual_pipeline_parallel_size,
            expert_parallel_size=self.expert_parallel_size,
            expert_tensor_parallel_size=self.expert_tensor_parallel_size,
        )
        _require(
            self.context_parallel_size == 1,
            f"parallel.context_parallel_size is {self.context_parallel_size}: only 1 is supported yet",
        )
        _one_of(
            "parallel.expert_tensor_parallel_size",
            self.expert_tensor_parallel_size,
            tuple(dict.fromkeys((1, self.tensor_parallel_size))),
        )
        _require(
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
            _require(
                world_size % model_size == 0,
                f"the world has {world_size} processes: {name} = {model_size} does not divide it",
            )
        return world_size // (self.tensor_parallel_size * self.pipeline_parallel_size)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Batch, length, precision, and how often to look, save and validate."""

    train_steps: int
    global_batch_size: int
    """Sequences per optimizer step over all processes."""
    micro_batch_size: int
    """Sequences per forward pass of one process."""
    seed: int = 1234
    dtype: str = "float32"
    """Precision of weights and activations in the model; master weights and gradient sums are always float32."""
    fp32_residual_connection: bool = False
    """Keep the residual stream in float32 when dtype is bfloat16."""
    threads_per_process: int = 0
    """CPU threads of each process; 0 shares the machine's cores among the local processes."""
    validate_every_steps: int = 100
    validation_sequences: int = 0
    """Held-out sequences, the first ones, of every validation; 0 takes all. After the last step all are taken once."""
    save_every_steps: int = 100
    stop_at_step: int = 0
    """Save and stop after this step, without changing the schedule; 0 goes on to train_steps."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; 0 keeps all."""

    def __post_init__(self) -> None:
        _positive(
            "train",
            train_steps=self.train_steps,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            validate_every_steps=self.validate_every_steps,
            save_every_steps=self.save_every_steps,
        )
        _require(
            self.train_steps <= MAX_STEPS,
            f"train.train_steps is {self.train_steps}: at most {MAX_STEPS} is accepted",
        )
        _require(
            self.stop_at_step <= self.train_steps,
            f"train.stop_at_step is {self.stop_at_step}: at most train.train_steps ({self.train_steps}) is accepted",
        )
        _one_of("train.dtype", self.dtype, ("float32", "bfloat16"))
        for name in (
            "seed",
            "threads_per_process",
            "validation_sequences",
            "stop_at_step",
            "keep_checkpoints",
        ):
            value = getattr(self, name)
            _require(value >= 0, f"train.{name} is {value}: it must be at least 0")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A whole recipe."""

    name: str
    """Everything the run writes lies under runs_folder/name."""
    runs_folder: str = "runs"
    model: Model
    data: Data
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule
    parallel: Parallel = field(default_factory=Parallel)
    train: Train

    def __post_init__(self) -> None:
        model, parallel, train = self.model, self.parallel, self.train
        _require(
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
            (
                "model.num_hidden_layers",
                model.num_hidden_layers,
                "pipeline_parallel_size x virtual_pipeline_parallel_size",
                pp * vpp,
            ),
        ):
            _require(
                value % divisor == 0,
                f"{label} is {value}: it must be a multiple of {divisor_label} ({divisor})",
            )
        _require(
            self.data.sequence_length <= model.max_position_embeddings,
            f"data.sequence_length is {self.data.sequence_length}: at most model.max_position_embeddings "
            f"({model.max_position_embeddings}) is accepted",
        )
        _require(
            self.schedule.warmup_steps <= train.train_steps,
            f"schedule.warmup_steps is {self.schedule.warmup_steps}: it must be at most train.train_steps "
            f"({train.train_steps})",
        )

    def num_microbatches(self, world_size: int) -> int:
        """Forward passes of one process per step; raises UserError if the batch cannot be split so."""
        train, parallel = self.train, self.parallel
        per_pass = train.micro_batch_size * parallel.data_parallel_size(world_size)
        _require(
            train.global_batch_size % per_pass == 0,
            f"train.global_batch_size is {train.global_batch_size}: it must be a multiple of train.micro_batch_size x "
            f"data-parallel size = {per_pass}",
        )
        count = train.global_batch_size // per_pass
        _require(
            parallel.virtual_pipeline_parallel_size == 1 or count % parallel.pipeline_parallel_size == 0,
            f"train.global_batch_size is {train.global_batch_size}: interleaved pipelines need micro-batches ({count}) "
            f"in multiples of parallel.pipeline_parallel_size ({parallel.pipeline_parallel_size})",
        )
        return count
