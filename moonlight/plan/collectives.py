"""Bytes on the wire of a step besides the exchange of gradients and weights: what the model's own layers send.

Per rank and step, payload of each direction, forward and backward pass together. Left out are all-reduces of a few
numbers: router counts, sums and maxima for the metrics, sizes of the dispatch (less than 0.1% of the 16B run's).
`tests/plan/test_collectives.py` compares with what real processes send.
"""

from dataclasses import dataclass

from moonlight.config.pipeline import stage_layers
from moonlight.config.run import RunConfig
from moonlight.placement.comm_bytes import CommBytes, weight_bytes
from moonlight.plan.activations import token_counts


@dataclass(frozen=True)
class DispatchedPairs:
    """Token-expert pairs of one micro-batch and layer that cross between expert-parallel ranks."""

    sent: float
    """Of this rank's tokens to experts of others."""
    received: float
    """Of others' tokens to this rank's experts."""


def uniform_dispatch(config: RunConfig) -> DispatchedPairs:
    """Every expert gets the same number of tokens."""
    ranks = config.parallel.expert_parallel_size
    pairs = token_counts(config).local * config.model.num_experts_per_tok * (ranks - 1) / ranks
    return DispatchedPairs(pairs, pairs)


def dispatch_comm_bytes(config: RunConfig, leaving: DispatchedPairs) -> CommBytes:
    """Of one micro-batch and layer, in the expert-parallel group: tokens to their experts with float32 probabilities,
    results back; and in the backward pass the gradients of both, the other way."""
    hidden = weight_bytes(config) * config.model.hidden_size
    each = 2 * hidden + 4
    both = leaving.sent + leaving.received
    # Forward: dispatch out, results of received pairs out. Backward: gradients of results out, of received tokens out.
    return CommBytes(both * each, both * each)


def expert_slices_comm_bytes(config: RunConfig, pairs: float | None = None) -> CommBytes:
    """Of one micro-batch and layer, among the tensor-parallel ranks of an expert: pairs that came to this rank are
    gathered with probabilities, and results summed in float32, forward; the mirror of it backward."""
    ranks = config.parallel.expert_tensor_parallel_size
    if pairs is None:
        pairs = token_counts(config).local * config.model.num_experts_per_tok
    element, hidden = weight_bytes(config), config.model.hidden_size
    # Tokens and probabilities: gathered forward, summed backward. Results: summed forward, gathered backward.
    once = (ranks - 1) * pairs * (element * hidden + 4 + 4 * hidden)
    return CommBytes(2 * once, 2 * once)


def tensor_layer_comm_bytes(config: RunConfig, *, with_experts: bool) -> CommBytes:
    """Of one micro-batch and layer, in the tensor-parallel group, under sequence parallelism.

    A column-parallel layer gathers its input forward, and again backward, where it also scatters the input's gradient
    summed. A row-parallel layer scatters its output summed, and gathers its gradient. The rope key goes by itself.
    """
    model_config = config.model
    query_input = model_config.q_lora_rank if model_config.q_lora_rank is not None else model_config.hidden_size
    widths = (
        3 * query_input
        + 3 * model_config.kv_lora_rank
        + 2 * model_config.qk_rope_head_dim
        + 2 * model_config.hidden_size
    )
    widths += 5 * model_config.hidden_size  # fc1 and fc2, of the dense or the shared SwiGLU
    again = config.train.recompute_modules
    if "mla_up_proj" in again or "layer" in again:
        widths += query_input + model_config.kv_lora_rank + model_config.qk_rope_head_dim
    if "layer" in again:
        widths += 3 * model_config.hidden_size
    flow = _slices_comm_bytes(config, widths * weight_bytes(config))
    if with_experts:
        # Counts of chosen experts for the auxiliary loss, of every sequence: an all-reduce.
        ranks = config.parallel.tensor_parallel_size
        counts = 2 * (ranks - 1) / ranks * 4 * model_config.num_experts * config.train.micro_batch_size
        flow += CommBytes(counts, counts)
    return flow


def embedding_comm_bytes(config: RunConfig) -> CommBytes:
    """Of one micro-batch, on the first stage: rows of the embedding, summed and scattered, and their gradient."""
    return _slices_comm_bytes(config, 2 * config.model.hidden_size * weight_bytes(config))


def head_comm_bytes(config: RunConfig) -> CommBytes:
    """Of one micro-batch, on the last stage: the head's input gathered, its gradient summed and scattered, and three
    float32 all-reduces of the loss."""
    flow = _slices_comm_bytes(config, 2 * config.model.hidden_size * weight_bytes(config))
    ranks = config.parallel.tensor_parallel_size
    loss = 3 * 2 * (ranks - 1) / ranks * 4 * token_counts(config).total
    return flow + CommBytes(loss, loss)


def pipeline_comm_bytes(config: RunConfig, stage: int, num_micro_batches: int) -> CommBytes:
    """Of a step: hidden states to the next chunk, gradients to the one before."""
    parallel = config.parallel
    stages, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    if stages == 1:
        return CommBytes()
    element = 4 if config.train.fp32_residual_connection else weight_bytes(config)
    once = token_counts(config).local * config.model.hidden_size * element * num_micro_batches
    has_next = virtual - (stage == stages - 1)  # chunks that are not the model's last
    has_previous = virtual - (stage == 0)
    both = once * (has_next + has_previous)
    return CommBytes(both, both)


def stage_comm_bytes(config: RunConfig, stage: int, num_micro_batches: int) -> dict[str, CommBytes]:
    """Of a step, by kind: slices (tensor-parallel), dispatch (expert-parallel), expert slices, pipeline."""
    parallel, model_config = config.parallel, config.model
    chunks = stage_layers(
        model_config.num_hidden_layers, parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    )[stage]
    layers = [layer for chunk in chunks for layer in chunk]
    mixtures = sum(layer >= model_config.first_k_dense_replace for layer in layers)
    # What is made again sends what its forward pass sent, half of both passes, once more.
    passes = 1.5 if "layer" in config.train.recompute_modules else 1.0
    slices = _times(tensor_layer_comm_bytes(config, with_experts=False), len(layers) - mixtures)
    slices += _times(tensor_layer_comm_bytes(config, with_experts=True), mixtures)
    if stage == 0:
        slices += embedding_comm_bytes(config)
    if stage == parallel.pipeline_parallel_size - 1:
        slices += head_comm_bytes(config)
    return {
        "slices": _times(slices, num_micro_batches),
        "dispatch": _times(
            dispatch_comm_bytes(config, uniform_dispatch(config)), passes * mixtures * num_micro_batches
        ),
        "expert slices": _times(expert_slices_comm_bytes(config), passes * mixtures * num_micro_batches),
        "pipeline": pipeline_comm_bytes(config, stage, num_micro_batches),
    }


def _slices_comm_bytes(config: RunConfig, bytes_of_token: float) -> CommBytes:
    """So many bytes of each token gathered, or summed and scattered, by all tensor-parallel ranks."""
    amount = (config.parallel.tensor_parallel_size - 1) * token_counts(config).local * bytes_of_token
    return CommBytes(amount, amount)


def _times(flow: CommBytes, count: float) -> CommBytes:
    return CommBytes(flow.sent * count, flow.received * count)
