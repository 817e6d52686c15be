"""The architecture section of a recipe."""

from dataclasses import dataclass

from moonlight.config.checks import positive, require


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
    """Layers without experts, the first ones; as many as there are layers make a dense model."""
    num_expert_groups: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 2.446
    aux_loss_alpha: float = 0.001
    """Coefficient of the sequence-wise auxiliary balance loss (DeepSeek-V3, eq. 17)."""
    rms_norm_eps: float = 1e-5
    rope_theta: float = 50000.0
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    """One matrix is embedding and head. Under pipeline parallelism the first and the last stage each hold a copy."""

    def __post_init__(self) -> None:
        positive(
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
        require(
            self.q_lora_rank is None or self.q_lora_rank > 0,
            f"model.q_lora_rank is {self.q_lora_rank}: it must be greater than 0, or null for a direct projection",
        )
        require(
            self.qk_rope_head_dim % 2 == 0,
            f"model.qk_rope_head_dim is {self.qk_rope_head_dim}: it must be even",
        )
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
        require(self.aux_loss_alpha >= 0, f"model.aux_loss_alpha is {self.aux_loss_alpha}: it must be at least 0")

    @property
    def has_experts(self) -> bool:
        """Whether any layer has; else the settings of experts count for nothing."""
        return self.first_k_dense_replace < self.num_hidden_layers
