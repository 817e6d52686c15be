"""What all ranks of a pipeline stage have in common: parameters, activations, arithmetic, the layers' own exchange."""

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
    """One pipeline stage. All figures are of one of its ranks, in bytes unless said; those of a step, of all its
    micro-batches."""

    number: int
    num_layers: int
    parameters: Sequence[PlannedParam]
    num_elements: int
    weights: int
    gradient_sums: int
    """Of every parameter, in `optimizer.gradient_dtype`."""
    buffers: int
    """Of the routers: bias and count of each expert, and the auxiliary loss."""
    num_micro_batches: int
    micro_batches_in_flight: int
    """Counted by chunk, where the pipeline is interleaved."""
    activations: float
    """Of the micro-batches in flight."""
    loss: float
    """While the loss is made."""
    flows: dict[str, CommBytes]
    """Of a step: slices, dispatch, expert slices, pipeline."""
    flops: float
    """Of a step, forward and backward pass."""
    recomputed_flops: float
    """Of a step, for what is made a second time."""


def make_stages(config: RunConfig, world_size: int, global_batch_size: int) -> list[PipelineStage]:
    """Every stage, in a step of this batch."""
    parallel, model_config, train_config = config.parallel, config.model, config.train
    stages, tp = parallel.pipeline_parallel_size, parallel.tensor_parallel_size
    cut = stage_layers(model_config.num_hidden_layers, stages, parallel.virtual_pipeline_parallel_size)
    count = global_batch_size // (train_config.micro_batch_size * parallel.data_parallel_size(world_size))
    num_tokens = count * train_config.micro_batch_size * config.data.sequence_length
    *flops_of_layers, flops_of_head = train_flops_by_part(model_config, config.data.sequence_length)
    found = []
    for index, chunks in enumerate(cut):
        layers = [layer for chunk in chunks for layer in chunk]
        parameters = stage_parameters(config, index)
        elements = sum(parameter.numel for parameter in parameters)
        is_last = index == stages - 1
        activations, in_flight = stage_activations(config, index, count)
        flops = sum(flops_of_layers[layer] for layer in layers) + (flops_of_head if is_last else 0)
        found.append(
            PipelineStage(
                number=index,
                num_layers=len(layers),
                parameters=parameters,
                num_elements=elements,
                weights=elements * weight_bytes(config),
                gradient_sums=elements * gradient_bytes(config),
                buffers=sum(p.key.endswith("router.weight") for p in parameters)
                * (2 * model_config.num_experts + 1)
                * 4,
                num_micro_batches=count,
                micro_batches_in_flight=in_flight,
                activations=activations,
                loss=loss_workspace(config, token_counts(config)) if is_last else 0.0,
                flows=stage_comm_bytes(config, index, count),
                flops=num_tokens * flops / tp,
                recomputed_flops=num_tokens * sum(_again(config, flops_of_layers[layer]) for layer in layers) / tp,
            )
        )
    return found


def _again(config: RunConfig, flops: float) -> float:
    """Of a token in a layer whose forward and backward pass take `flops`: what `train.recompute_modules` adds. Norms
    and activations are not counted, here as there."""
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
