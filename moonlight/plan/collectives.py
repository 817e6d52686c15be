"""Bytes on the wire of a step besides the exchange of gradients and weights: what the model's own layers send.

Per rank and step, payload of each direction, forward and backward pass together. Left out are all-reduces of a few
numbers: router counts, sums and maxima for the metrics, sizes of the dispatch (less than 0.1% of the 16B run's).
`tests/plan/test_collectives.py` compares with what real processes send.
"""

from dataclasses import dataclass

from moonlight.config.pipeline import layers_of_stages
from moonlight.config.run import Run
from moonlight.placement.comm_bytes import Flow, weight_bytes
from moonlight.plan.activations import tokens_of


@dataclass(frozen=True)
class Leaving:
    """Token-expert pairs of one micro-batch and layer that cross between expert-parallel ranks."""

    sent: float
    """Of this rank's tokens to experts of others."""
    received: float
    """Of others' tokens to this rank's experts."""


def uniform_leaving(run: Run) -> Leaving:
    """Every expert gets the same number of tokens."""
    ranks = run.parallel.expert_parallel_size
    pairs = tokens_of(run).own * run.model.num_experts_per_tok * (ranks - 1) / ranks
    return Leaving(pairs, pairs)


def dispatch_flow(run: Run, leaving: Leaving) -> Flow:
    """Of one micro-batch and layer, in the expert-parallel group: tokens to their experts with float32 probabilities,
    results back; and in the backward pass the gradients of both, the other way."""
    hidden = weight_bytes(run) * run.model.hidden_size
    each = 2 * hidden + 4
    both = leaving.sent + leaving.received
    # Forward: dispatch out, results of received pairs out. Backward: gradients of results out, of received tokens out.
    return Flow(both * each, both * each)


def expert_slices_flow(run: Run, pairs: float | None = None) -> Flow:
    """Of one micro-batch and layer, among the tensor-parallel ranks of an expert: pairs that came to this rank are
    gathered with probabilities, and results summed in float32, forward; the mirror of it backward."""
    ranks = run.parallel.expert_tensor_parallel_size
    if pairs is None:
        pairs = tokens_of(run).own * run.model.num_experts_per_tok
    element, hidden = weight_bytes(run), run.model.hidden_size
    # Tokens and probabilities: gathered forward, summed backward. Results: summed forward, gathered backward.
    once = (ranks - 1) * pairs * (element * hidden + 4 + 4 * hidden)
    return Flow(2 * once, 2 * once)


def tensor_layer_flow(run: Run, *, with_experts: bool) -> Flow:
    """Of one micro-batch and layer, in the tensor-parallel group, under sequence parallelism.

    A column-parallel layer gathers its input forward, and again backward, where it also scatters the input's gradient
    summed. A row-parallel layer scatters its output summed, and gathers its gradient. The rope key goes by itself.
    """
    model = run.model
    query_input = model.q_lora_rank if model.q_lora_rank is not None else model.hidden_size
    widths = 3 * query_input + 3 * model.kv_lora_rank + 2 * model.qk_rope_head_dim + 2 * model.hidden_size
    widths += 5 * model.hidden_size  # fc1 and fc2, of the dense or the shared SwiGLU
    again = run.train.recompute_modules
    if "mla_up_proj" in again or "layer" in again:
        widths += query_input + model.kv_lora_rank + model.qk_rope_head_dim
    if "layer" in again:
        widths += 3 * model.hidden_size
    flow = _slices_flow(run, widths * weight_bytes(run))
    if with_experts:
        # Counts of chosen experts for the auxiliary loss, of every sequence: an all-reduce.
        ranks = run.parallel.tensor_parallel_size
        counts = 2 * (ranks - 1) / ranks * 4 * model.num_experts * run.train.micro_batch_size
        flow += Flow(counts, counts)
    return flow


def embedding_flow(run: Run) -> Flow:
    """Of one micro-batch, on the first stage: rows of the embedding, summed and scattered, and their gradient."""
    return _slices_flow(run, 2 * run.model.hidden_size * weight_bytes(run))


def head_flow(run: Run) -> Flow:
    """Of one micro-batch, on the last stage: the head's input gathered, its gradient summed and scattered, and three
    float32 all-reduces of the loss."""
    flow = _slices_flow(run, 2 * run.model.hidden_size * weight_bytes(run))
    ranks = run.parallel.tensor_parallel_size
    loss = 3 * 2 * (ranks - 1) / ranks * 4 * tokens_of(run).whole
    return flow + Flow(loss, loss)


def pipeline_flow(run: Run, stage: int, num_micro_batches: int) -> Flow:
    """Of a step: hidden states to the next chunk, gradients to the one before."""
    parallel = run.parallel
    stages, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    if stages == 1:
        return Flow()
    element = 4 if run.train.fp32_residual_connection else weight_bytes(run)
    once = tokens_of(run).own * run.model.hidden_size * element * num_micro_batches
    has_next = virtual - (stage == stages - 1)  # chunks that are not the model's last
    has_previous = virtual - (stage == 0)
    both = once * (has_next + has_previous)
    return Flow(both, both)


def stage_flows(run: Run, stage: int, num_micro_batches: int) -> dict[str, Flow]:
    """Of a step, by kind: slices (tensor-parallel), dispatch (expert-parallel), expert slices, pipeline."""
    parallel, model = run.parallel, run.model
    chunks = layers_of_stages(
        model.num_hidden_layers, parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    )[stage]
    layers = [layer for chunk in chunks for layer in chunk]
    mixtures = sum(layer >= model.first_k_dense_replace for layer in layers)
    # What is made again sends what its forward pass sent, half of both passes, once more.
    passes = 1.5 if "layer" in run.train.recompute_modules else 1.0
    slices = _times(tensor_layer_flow(run, with_experts=False), len(layers) - mixtures)
    slices += _times(tensor_layer_flow(run, with_experts=True), mixtures)
    if stage == 0:
        slices += embedding_flow(run)
    if stage == parallel.pipeline_parallel_size - 1:
        slices += head_flow(run)
    return {
        "slices": _times(slices, num_micro_batches),
        "dispatch": _times(dispatch_flow(run, uniform_leaving(run)), passes * mixtures * num_micro_batches),
        "expert slices": _times(expert_slices_flow(run), passes * mixtures * num_micro_batches),
        "pipeline": pipeline_flow(run, stage, num_micro_batches),
    }


def _slices_flow(run: Run, bytes_of_token: float) -> Flow:
    """So many bytes of each token gathered, or summed and scattered, by all tensor-parallel ranks."""
    amount = (run.parallel.tensor_parallel_size - 1) * tokens_of(run).own * bytes_of_token
    return Flow(amount, amount)


def _times(flow: Flow, count: float) -> Flow:
    return Flow(flow.sent * count, flow.received * count)
