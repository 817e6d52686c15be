"""Costs that all ranks of a pipeline stage share: parameters, activations, arithmetic, communication of its layers."""

from collections.abc import Sequence
from dataclasses import dataclass

from moonlight.config.pipeline import stage_layers
from moonlight.config.run import RunConfig
from moonlight.placement.comm_bytes import CommBytes, gradient_bytes, weight_bytes
from moonlight.plan.activations import loss_workspace, stage_activations, token_counts
from moonlight.plan.collectives import stage_comm_bytes
from moonlight.plan.cut import PlannedParam, stage_parameters
from moonlight.plan.flops import train_flops_by_part


@dataclass(frozen=True, kw_only=True)
class PipelineStage:
    """One pipeline stage. All values are for one of its ranks, in bytes unless noted.

    Values for a step cover all micro-batches of the step.
    """

    index: int
    num_layers: int
    parameters: Sequence[PlannedParam]
    num_elements: int
    weights: int
    gradient_sums: int
    """Gradients of every parameter, in `optimizer.gradient_dtype`."""
    buffers: int
    """Router buffers: bias and token count of each expert, and the auxiliary loss."""
    num_micro_batches: int
    """Micro-batches of a step."""
    micro_batches_in_flight: int
    """Micro-batches of a chunk if the pipeline is interleaved."""
    activations: float
    """Activations of the micro-batches in flight."""
    loss: float
    """Workspace of the loss; 0 except on the last stage."""
    comm_bytes: dict[str, CommBytes]
    """Communication of a step by kind: slices, dispatch, expert slices, pipeline."""
    flops: float
    """FLOPs of a step, forward and backward pass."""
    recomputed_flops: float
    """FLOPs of a step that `train.recompute_modules` adds."""


def make_stages(config: RunConfig, world_size: int, global_batch_size: int) -> list[PipelineStage]:
    """Compute the costs of every stage, in a step of `global_batch_size` sequences."""
    parallel, model_config, train_config = config.parallel, config.model, config.train
    num_stages, tp = parallel.pipeline_parallel_size, parallel.tensor_parallel_size
    chunks_by_stage = stage_layers(model_config.num_hidden_layers, num_stages, parallel.virtual_pipeline_parallel_size)
    count = global_batch_size // (train_config.micro_batch_size * parallel.data_parallel_size(world_size))
    num_tokens = count * train_config.micro_batch_size * config.data.sequence_length
    *layer_flops, head_flops = train_flops_by_part(model_config, config.data.sequence_length)
    stages = []
    for index, chunks in enumerate(chunks_by_stage):
        layers = [layer for chunk in chunks for layer in chunk]
        parameters = stage_parameters(config, index)
        num_elements = sum(parameter.numel for parameter in parameters)
        is_last = index == num_stages - 1
        activations, in_flight = stage_activations(config, index, count)
        flops = sum(layer_flops[layer] for layer in layers) + (head_flops if is_last else 0)
        recomputed = sum(_recompute_flops(config, layer_flops[layer]) for layer in layers)
        num_routers = sum(parameter.key.endswith("router.weight") for parameter in parameters)
        stages.append(
            PipelineStage(
                index=index,
                num_layers=len(layers),
                parameters=parameters,
                num_elements=num_elements,
                weights=num_elements * weight_bytes(config),
                gradient_sums=num_elements * gradient_bytes(config),
                buffers=4 * (2 * model_config.num_experts + 1) * num_routers,
                num_micro_batches=count,
                micro_batches_in_flight=in_flight,
                activations=activations,
                loss=loss_workspace(config, token_counts(config)) if is_last else 0.0,
                comm_bytes=stage_comm_bytes(config, index, count),
                flops=num_tokens * flops / tp,
                recomputed_flops=num_tokens * recomputed / tp,
            )
        )
    return stages


def _recompute_flops(config: RunConfig, flops: float) -> float:
    """Return the FLOPs that `train.recompute_modules` adds for a token in one layer.

    `flops` is the layer's forward and backward pass. Both counts exclude norms and activations.
    """
    if "layer" in config.train.recompute_modules:
        return flops / 3
    if "mla_up_proj" not in config.train.recompute_modules:
        return 0.0
    model_config = config.model
    query = model_config.num_attention_heads * (model_config.qk_nope_head_dim + model_config.qk_rope_head_dim)
    keys_and_values = model_config.num_attention_heads * (model_config.qk_nope_head_dim + model_config.v_head_dim)
    return 2.0 * (
        query * (model_config.q_lora_rank or model_config.hidden_size) + keys_and_values * model_config.kv_lora_rank
    )
