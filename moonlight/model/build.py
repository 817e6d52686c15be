"""Build this rank's part of the model on Megatron-Core from a configuration."""

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset

from moonlight.config.data import DataConfig
from moonlight.config.pipeline import head_counts_as_layer
from moonlight.config.run import RunConfig
from moonlight.model.attention import CausalAttention
from moonlight.model.experts import Experts
from moonlight.model.language_model import LanguageModel, MoonlightLayer
from moonlight.model.latent_attention import LatentAttention
from moonlight.model.linear import LatentRMSNorm, ReplicatedLinear, RMSNorm
from moonlight.model.mlp import DenseMLP, MoEBlock, SharedExperts
from moonlight.model.router import Router

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_transformer_config(config: RunConfig) -> MLATransformerConfig:
    """Return Megatron's configuration of a run."""
    model_config, parallel = config.model, config.parallel
    dtype = DTYPES[config.train.dtype]
    num_dense, num_layers = model_config.first_k_dense_replace, model_config.num_hidden_layers
    interleaved = parallel.virtual_pipeline_parallel_size > 1
    grouped = model_config.num_expert_groups > 1
    return MLATransformerConfig(
        num_layers=num_layers,
        hidden_size=model_config.hidden_size,
        num_attention_heads=model_config.num_attention_heads,
        ffn_hidden_size=model_config.intermediate_size,
        q_lora_rank=model_config.q_lora_rank,
        kv_lora_rank=model_config.kv_lora_rank,
        qk_head_dim=model_config.qk_nope_head_dim,
        qk_pos_emb_head_dim=model_config.qk_rope_head_dim,
        v_head_dim=model_config.v_head_dim,
        rope_type="rope",
        rotary_base=model_config.rope_theta,
        num_moe_experts=model_config.num_experts,
        moe_layer_freq=[0] * num_dense + [1] * (num_layers - num_dense),
        moe_ffn_hidden_size=model_config.moe_intermediate_size,
        moe_shared_expert_intermediate_size=model_config.moe_intermediate_size * model_config.num_shared_experts,
        moe_router_topk=model_config.num_experts_per_tok,
        moe_router_topk_scaling_factor=model_config.routed_scaling_factor,
        moe_router_num_groups=model_config.num_expert_groups if grouped else None,
        moe_router_group_topk=model_config.topk_group if grouped else None,
        moe_router_load_balancing_type="none",  # model/router.py computes the auxiliary loss and the bias
        moe_token_dispatcher_type="alltoall",
        layernorm_epsilon=model_config.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        sequence_parallel=parallel.tensor_parallel_size > 1,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_parallel_size if interleaved else None,
        account_for_loss_in_pipeline_split=head_counts_as_layer(
            num_layers, parallel.pipeline_parallel_size * parallel.virtual_pipeline_parallel_size
        ),
        expert_model_parallel_size=parallel.expert_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        params_dtype=dtype,
        pipeline_dtype=torch.float32 if config.train.fp32_residual_connection else dtype,
        fp32_residual_connection=config.train.fp32_residual_connection,
        bf16=dtype is torch.bfloat16,
        # With Megatron's defaults, interleaved schedules silently exchange wrong activations over gloo.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # An interleaved schedule may free an output that gloo still sends.
        deallocate_pipeline_outputs=torch.cuda.is_available() or not interleaved,
        recompute_modules=list(config.train.recompute_modules),  # read by our layers, not by Megatron's
        # Losses are sums over this rank's tokens, divided by the global count; see train/forward_backward.py.
        calculate_per_token_loss=True,
        perform_initialization=False,  # shards.init_weights or a checkpoint fills every tensor
    )


def _layer_spec(with_experts: bool, data_config: DataConfig) -> ModuleSpec:
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    if with_experts:
        mlp = ModuleSpec(
            module=MoEBlock,
            submodules=MoESubmodules(
                router=Router,
                experts=ModuleSpec(module=Experts),
                shared_experts=ModuleSpec(module=SharedExperts, submodules=linears),
            ),
        )
    else:
        mlp = ModuleSpec(module=DenseMLP, submodules=linears)
    attention = ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal, "reset_positions": data_config.reset_positions},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            linear_q_down_proj=ReplicatedLinear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=ReplicatedLinear,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=ModuleSpec(module=CausalAttention, params={"mask_documents": data_config.mask_documents}),
            linear_proj=RowParallelLinear,
            q_layernorm=LatentRMSNorm,
            kv_layernorm=LatentRMSNorm,
        ),
    )
    return ModuleSpec(
        module=MoonlightLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            pre_cross_attn_layernorm=IdentityOp,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
        ),
    )


def build_model(config: RunConfig) -> list[LanguageModel]:
    """Return this rank's model chunks (one, or one per virtual pipeline stage), with uninitialized weights.

    Call `parallel.init_model_parallel` first.
    """
    transformer_config = build_transformer_config(config)
    num_chunks = config.parallel.virtual_pipeline_parallel_size
    groups = ProcessGroupCollection.use_mpu_process_groups()
    # With this group, Megatron moves a tied embedding to CUDA and sends it, uninitialized, to the last stage.
    groups.embd = None
    model_chunks = []
    for chunk in range(num_chunks):
        stage = chunk if num_chunks > 1 else None
        start = get_transformer_layer_offset(transformer_config, stage)
        stop = start + get_num_layers_to_build(transformer_config, stage)
        num_dense = config.model.first_k_dense_replace
        specs = [_layer_spec(layer >= num_dense, config.data) for layer in range(start, stop)]
        chunk_model = LanguageModel(
            config=transformer_config,
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm),
            vocab_size=config.model.vocab_size,
            max_sequence_length=config.model.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            position_embedding_type="none",  # LatentAttention applies the rotary embedding
            share_embeddings_and_output_weights=config.model.tie_word_embeddings,
            pg_collection=groups,
            vp_stage=stage,
        )
        model_chunks.append(chunk_model)
    return model_chunks
