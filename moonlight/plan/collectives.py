"""Bytes that the model's layers send and receive in a step, without the exchange of gradients and weights.

Values are payload per rank and step in each direction, forward and backward pass together. They omit all-reduces of a
few numbers: router counts, sums and maxima for the metrics, sizes of the dispatch (less than 0.1% of the 16B run's
bytes). `tests/plan/test_collectives.py` compares them with the bytes of real processes.
"""

from moonlight.config.pipeline import stage_layers
from moonlight.config.run import RunConfig
from moonlight.placement.comm_bytes import CommBytes, weight_bytes
from moonlight.plan.activations import residual_bytes, token_counts


def uniform_dispatch(config: RunConfig) -> float:
    """Return `num_pairs` of `dispatch_comm_bytes` if every expert gets the same number of tokens."""
    ranks = config.parallel.expert_parallel_size
    return 2 * (token_counts(config).local * config.model.num_experts_per_tok * (ranks - 1) / ranks)


def dispatch_comm_bytes(config: RunConfig, num_pairs: float) -> CommBytes:
    """Return the bytes of one micro-batch and layer in the expert-parallel group.

    The forward pass sends tokens with float32 probabilities to their experts, and results back. The backward pass sends
    the gradients of both in the opposite direction.

    Args:
        num_pairs: token-expert pairs that this rank sends to other ranks, and that it receives from them, together.
    """
    hidden = weight_bytes(config) * config.model.hidden_size
    # Sent forward: dispatched pairs, results of received pairs. Backward: gradients of results and of received tokens.
    return CommBytes(num_pairs * (2 * hidden + 4), num_pairs * (2 * hidden + 4))


def expert_slices_comm_bytes(config: RunConfig, pairs: float | None = None) -> CommBytes:
    """Return the bytes of one micro-batch and layer in the expert-tensor-parallel group.

    The forward pass gathers the pairs that this rank received, with probabilities, and sums the results in float32. The
    backward pass does the reverse. `pairs`: measured pairs of this rank; None assumes uniform routing.
    """
    ranks = config.parallel.expert_tensor_parallel_size
    if pairs is None:
        pairs = token_counts(config).local * config.model.num_experts_per_tok
    element, hidden = weight_bytes(config), config.model.hidden_size
    # Tokens and probabilities: gathered forward, summed backward. Results: summed forward, gathered backward.
    once = (ranks - 1) * pairs * (element * hidden + 4 + 4 * hidden)
    return CommBytes(2 * once, 2 * once)


def tensor_layer_comm_bytes(config: RunConfig, *, with_experts: bool) -> CommBytes:
    """Return the bytes of one micro-batch and layer in the tensor-parallel group, under sequence parallelism.

    A column-parallel layer all-gathers its input in the forward pass and again in the backward pass, which also
    reduce-scatters the input's gradient. A row-parallel layer reduce-scatters its output and all-gathers the output's
    gradient. The rope key is a separate transfer.
    """
    model_config = config.model
    query_input = model_config.q_lora_rank if model_config.q_lora_rank is not None else model_config.hidden_size
    widths = 3 * (query_input + model_config.kv_lora_rank) + 2 * model_config.qk_rope_head_dim
    widths += (2 + 5) * model_config.hidden_size  # attention's output; fc1 and fc2 of the dense or the shared SwiGLU
    recomputed = config.train.recompute_modules
    if "mla_up_proj" in recomputed or "layer" in recomputed:
        widths += query_input + model_config.kv_lora_rank + model_config.qk_rope_head_dim
    if "layer" in recomputed:
        widths += 3 * model_config.hidden_size
    comm_bytes = _slices_comm_bytes(config, widths * weight_bytes(config))
    if with_experts:
        # The auxiliary loss all-reduces the counts of selected experts of every sequence.
        ranks = config.parallel.tensor_parallel_size
        counts = 2 * (ranks - 1) / ranks * 4 * model_config.num_experts * config.train.micro_batch_size
        comm_bytes += CommBytes(counts, counts)
    return comm_bytes


def embedding_comm_bytes(config: RunConfig) -> CommBytes:
    """Return the bytes of one micro-batch on the first stage: reduce-scattered embedding rows, and their gradient."""
    return _slices_comm_bytes(config, 2 * config.model.hidden_size * weight_bytes(config))


def head_comm_bytes(config: RunConfig) -> CommBytes:
    """Return the bytes of one micro-batch on the last stage.

    The head all-gathers its input and reduce-scatters the input's gradient. The loss runs three float32 all-reduces.
    """
    comm_bytes = _slices_comm_bytes(config, 2 * config.model.hidden_size * weight_bytes(config))
    ranks = config.parallel.tensor_parallel_size
    loss = 3 * 2 * (ranks - 1) / ranks * 4 * token_counts(config).total
    return comm_bytes + CommBytes(loss, loss)


def pipeline_comm_bytes(config: RunConfig, stage: int, num_micro_batches: int) -> CommBytes:
    """Return the bytes of a step: hidden states to the next chunk, gradients to the previous one."""
    parallel = config.parallel
    stages, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    if stages == 1:
        return CommBytes()
    hidden_states = token_counts(config).local * config.model.hidden_size * residual_bytes(config) * num_micro_batches
    num_next = virtual - (stage == stages - 1)  # chunks that are not the model's last
    num_previous = virtual - (stage == 0)
    total = hidden_states * (num_next + num_previous)
    return CommBytes(total, total)


def stage_comm_bytes(config: RunConfig, stage: int, num_micro_batches: int) -> dict[str, CommBytes]:
    """Return the bytes of a step by kind.

    Kinds: "slices" (tensor-parallel), "dispatch" (expert-parallel), "expert slices" (expert-tensor-parallel) and
    "pipeline".
    """
    parallel, model_config = config.parallel, config.model
    chunks = stage_layers(
        model_config.num_hidden_layers, parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    )[stage]
    layers = [layer for chunk in chunks for layer in chunk]
    num_moe = sum(layer >= model_config.first_k_dense_replace for layer in layers)
    # A recomputed layer repeats the communication of its forward pass, which is half of both passes.
    passes = 1.5 if "layer" in config.train.recompute_modules else 1.0
    slices = _times(tensor_layer_comm_bytes(config, with_experts=False), len(layers) - num_moe)
    slices += _times(tensor_layer_comm_bytes(config, with_experts=True), num_moe)
    if stage == 0:
        slices += embedding_comm_bytes(config)
    if stage == parallel.pipeline_parallel_size - 1:
        slices += head_comm_bytes(config)
    return {
        "slices": _times(slices, num_micro_batches),
        "dispatch": _times(dispatch_comm_bytes(config, uniform_dispatch(config)), passes * num_moe * num_micro_batches),
        "expert slices": _times(expert_slices_comm_bytes(config), passes * num_moe * num_micro_batches),
        "pipeline": pipeline_comm_bytes(config, stage, num_micro_batches),
    }


def _slices_comm_bytes(config: RunConfig, bytes_per_token: float) -> CommBytes:
    """Return the bytes of an all-gather or reduce-scatter over tensor-parallel ranks."""
    total = (config.parallel.tensor_parallel_size - 1) * token_counts(config).local * bytes_per_token
    return CommBytes(total, total)


def _times(comm_bytes: CommBytes, count: float) -> CommBytes:
    return CommBytes(comm_bytes.sent * count, comm_bytes.received * count)
