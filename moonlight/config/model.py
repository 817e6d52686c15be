"""The model section of a recipe."""

from dataclasses import dataclass

from moonlight.config.checks import NonNegative, Positive, check_fields, require


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture. Names are those of a DeepSeek-V3 `config.json`, except num_experts (n_routed_experts there),
    num_shared_experts (n_shared_experts) and num_expert_groups (n_group)."""

    vocab_size: Positive[int]
    """Rows of embedding and head. At least the number of the tokenizer's ids."""
    hidden_size: Positive[int]
    """Width of the residual stream."""
    num_hidden_layers: Positive[int]
    """Transformer layers."""
    num_attention_heads: Positive[int]
    """Attention heads of each layer."""
    q_lora_rank: Positive[int | None] = None
    """null: one direct query projection (Moonlight). A number: down-projection, norm, up-projection."""
    kv_lora_rank: Positive[int] = 512
    """Width of the latent that keys and values are projected from."""
    qk_nope_head_dim: Positive[int] = 128
    """Width of a head's queries and keys without positions."""
    qk_rope_head_dim: Positive[int] = 64
    """Width of the rotary part of a head's queries and keys: even."""
    v_head_dim: Positive[int] = 128
    """Width of a head's values."""
    intermediate_size: Positive[int]
    """Width of the dense SwiGLU of the first layers."""
    moe_intermediate_size: Positive[int]
    """Width of one routed expert. The shared experts are one SwiGLU of num_shared_experts times this width."""
    num_experts: Positive[int]
    """Routed experts of a layer."""
    num_experts_per_tok: Positive[int]
    """Routed experts that each token uses."""
    num_shared_experts: Positive[int] = 2
    """Shared experts of a layer, used by every token."""
    first_k_dense_replace: int = 1
    """First layers, which have no experts. As many as num_hidden_layers make a dense model."""
    num_expert_groups: Positive[int] = 1
    """Groups that the routed experts of a layer are divided into."""
    topk_group: Positive[int] = 1
    """Groups that each token's experts come from."""
    routed_scaling_factor: Positive[float] = 2.446
    """Factor of the weights of routed experts."""
    aux_loss_alpha: NonNegative[float] = 0.001
    """Coefficient of the sequence-wise auxiliary balance loss (DeepSeek-V3, eq. 17)."""
    rms_norm_eps: Positive[float] = 1e-5
    """Added to the mean square in every norm."""
    rope_theta: Positive[float] = 50000.0
    """Base of the rotary frequencies."""
    max_position_embeddings: Positive[int] = 8192
    """Longest sequence."""
    initializer_range: Positive[float] = 0.02
    """Standard deviation of initial weights."""
    tie_word_embeddings: bool = False
    """One matrix is embedding and head. Under pipeline parallelism the first and the last stage each hold a copy."""

    def __post_init__(self) -> None:
        check_fields("model", self)
        require(self.qk_rope_head_dim % 2 == 0, f"model.qk_rope_head_dim is {self.qk_rope_head_dim}: it must be even")
        require(
            1 <= self.first_k_dense_replace <= self.num_hidden_layers,
            f"model.first_k_dense_replace is {self.first_k_dense_replace}: it must be from 1 to "
            f"{self.num_hidden_layers} (model.num_hidden_layers), which makes every layer dense",
        )
        require(
            self.num_experts % self.num_expert_groups == 0,
            f"model.num_experts is {self.num_experts}: it must be a multiple of model.num_expert_groups "
            f"({self.num_expert_groups})",
        )
        require(
            self.topk_group <= self.num_expert_groups,
            f"model.topk_group is {self.topk_group}: it must be at most model.num_expert_groups "
            f"({self.num_expert_groups})",
        )
        selectable = self.num_experts // self.num_expert_groups * self.topk_group
        require(
            self.num_experts_per_tok <= selectable,
            f"model.num_experts_per_tok is {self.num_experts_per_tok}: at most {selectable} experts can be chosen",
        )
        require(
            self.num_expert_groups == 1 or self.num_experts // self.num_expert_groups >= 2,
            f"model.num_expert_groups is {self.num_expert_groups}: a group needs at least 2 experts",
        )

    @property
    def has_experts(self) -> bool:
        """True if any layer has experts. If none has, the settings of experts have no effect."""
        return self.first_k_dense_replace < self.num_hidden_layers
