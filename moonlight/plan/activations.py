"""Activations: bytes that autograd keeps of one micro-batch until its backward pass, operation by operation.

`tests/plan/test_activations.py` compares the formulas with a real forward pass. A CPU differs from a GPU in two places:
attention (`moonlight/model/cpu_attention.py`), and the rows of each expert, which a CPU pads to more tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moonlight.config.pipeline import stage_layers
from moonlight.config.run import RunConfig
from moonlight.kernels.chunk_sizes import EXPERT_ROW_ALIGNMENT, logits_chunk_rows
from moonlight.placement.comm_bytes import weight_bytes


@dataclass(frozen=True)
class SavedActivation:
    """Bytes that one operation keeps of one micro-batch on one rank."""

    operation: str
    bytes: float
    recomputed_by: str = ""
    """Entry of `train.recompute_modules` that recomputes the tensor instead of keeping it; empty: always kept."""


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of one micro-batch on one rank."""

    total: int
    """Tokens of all its sequences; tensor-parallel ranks share them."""
    local: float
    """Tokens of this rank under sequence parallelism, total / tensor-parallel size."""
    sequence_length: int
    expert_pairs: float
    """Token-expert pairs that reach this rank's experts. Uniform routing gives every expert the same number."""


def token_counts(config: RunConfig, pairs: float | None = None) -> TokenCounts:
    """Count the tokens of a micro-batch. `pairs`: measured token-expert pairs; None assumes uniform routing."""
    parallel, length = config.parallel, config.data.sequence_length
    total = config.train.micro_batch_size * length
    local = total / parallel.tensor_parallel_size
    if pairs is None:
        pairs = local * config.model.num_experts_per_tok * parallel.expert_tensor_parallel_size
    return TokenCounts(total, local, length, pairs)


def layer_activations(
    config: RunConfig, tokens: TokenCounts, *, with_experts: bool, on_cpu: bool = False
) -> Iterator[SavedActivation]:
    """Yield the tensors that a layer keeps, operation by operation.

    A tensor that several operations keep appears once, at the operation that makes it. `w` is bytes of a weight's
    dtype; float32 takes 4 bytes, int64 takes 8.
    """
    recomputed = config.train.recompute_modules
    if "layer" in recomputed:
        yield SavedActivation("input of the layer", tokens.local * config.model.hidden_size * residual_bytes(config))
        return
    for saved in _all_activations(config, tokens, with_experts, on_cpu):
        if saved.recomputed_by not in recomputed:
            yield saved


def _all_activations(
    config: RunConfig, tokens: TokenCounts, with_experts: bool, on_cpu: bool
) -> Iterator[SavedActivation]:
    """Yield all tensors of a layer's backward pass, including those that `train.recompute_modules` recomputes."""
    model_config, tp, w = config.model, config.parallel.tensor_parallel_size, weight_bytes(config)
    hidden, heads = model_config.hidden_size, model_config.num_attention_heads / tp
    local, total = tokens.local, tokens.total
    nope, rope, value = model_config.qk_nope_head_dim, model_config.qk_rope_head_dim, model_config.v_head_dim

    yield _norm("input_layernorm", local, hidden, residual_bytes(config))
    yield SavedActivation("input of the down-projections (or q_proj)", local * w * hidden, "layernorm")
    if model_config.q_lora_rank is not None:
        yield _norm("q_layernorm", local, model_config.q_lora_rank, w)
        yield SavedActivation("input of q_up_proj", local * w * model_config.q_lora_rank)
    # The norm's input shares a tensor with the rope key, and values share one with keys without rope; autograd keeps
    # both tensors in full.
    yield _norm("kv_layernorm", local, model_config.kv_lora_rank + rope, w)
    yield SavedActivation("input of kv_up_proj", local * w * model_config.kv_lora_rank)
    yield SavedActivation(
        "queries, keys and values", total * heads * w * (2 * (nope + rope) + nope + value), "mla_up_proj"
    )
    # On a CPU, attention keeps its output by head, and the output projection keeps its input by token.
    yield SavedActivation(
        "attention: output, and 4 bytes a head", total * heads * (w * value * (2 if on_cpu else 1) + 4)
    )
    yield _norm("pre_mlp_layernorm", local, hidden, residual_bytes(config))
    yield SavedActivation("input of the MLP", local * w * hidden, "layernorm")
    if not with_experts:
        width = model_config.intermediate_size / tp
        yield SavedActivation("dense MLP: gate and up", total * w * 2 * width)
        yield SavedActivation("dense MLP: activation", total * w * width, "mlp_act")
        return
    width = model_config.moe_intermediate_size * model_config.num_shared_experts / tp
    yield SavedActivation("shared experts: gate and up", total * w * 2 * width)
    yield SavedActivation("shared experts: activation", total * w * width, "mlp_act")
    if w == 2:
        yield SavedActivation("router: input and weight in float32", 4 * hidden * (local + model_config.num_experts))
    num_experts, top_k = model_config.num_experts, model_config.num_experts_per_tok
    yield SavedActivation("router: scores, choice and sums", local * (4 * num_experts + 8 * top_k + 4 * top_k + 8))
    if model_config.aux_loss_alpha > 0:
        yield SavedActivation("router: loads of its loss", 4 * config.train.micro_batch_size * num_experts)
    expert_ranks = config.parallel.expert_parallel_size * config.parallel.expert_tensor_parallel_size
    if expert_ranks > 1:
        yield SavedActivation("dispatch: probabilities, map and order", local * (5 * num_experts + 8 * top_k))
        yield SavedActivation("experts: input", tokens.expert_pairs * w * hidden)
    local_experts = num_experts // config.parallel.expert_parallel_size
    # Every expert's rows start at a multiple of the alignment. The buffer always includes the largest possible gaps.
    gaps = local_experts * (EXPERT_ROW_ALIGNMENT["cpu" if on_cpu else "cuda"] - 1)
    num_rows = tokens.expert_pairs + (gaps if tokens.expert_pairs else 0)
    yield SavedActivation(
        "experts: probabilities and order", tokens.expert_pairs * (4 + 8) + num_rows * 8 + local_experts * 4
    )
    width = model_config.moe_intermediate_size / config.parallel.expert_tensor_parallel_size
    yield SavedActivation("experts: gate and up", num_rows * w * 2 * width)


def angles_bytes(config: RunConfig, tokens: TokenCounts) -> int:
    """Return bytes of the rotary embedding's cosines and sines, float32, which all layers share.

    They cover every position of a sequence, or every token of the micro-batch under `data.reset_positions`.
    """
    num_positions = tokens.total if config.data.reset_positions else tokens.sequence_length
    return num_positions * 2 * 4 * config.model.qk_rope_head_dim


def mask_bytes(config: RunConfig, tokens: TokenCounts, *, on_cpu: bool = False) -> int:
    """Return bytes of the document mask, which all layers of a pass share: an addend to every attention logit."""
    is_masked = config.data.mask_documents and not on_cpu
    return tokens.total * tokens.sequence_length * weight_bytes(config) if is_masked else 0


def head_activations(config: RunConfig, tokens: TokenCounts) -> Iterator[SavedActivation]:
    """Yield what the last stage also keeps. The loss keeps gradients, neither its input nor the logits."""
    hidden, w = config.model.hidden_size, weight_bytes(config)
    yield _norm("final_layernorm", tokens.local, hidden, residual_bytes(config))
    yield SavedActivation("gradient of the head's input", tokens.total * w * hidden)
    yield SavedActivation("gradient of the head", _vocabulary(config) * w * hidden)


def loss_workspace(config: RunConfig, tokens: TokenCounts) -> float:
    """Return bytes that the loss needs temporarily: a chunk of logits, and the head's gradient in float32 if weights
    are bfloat16.

    Until the loss has run, a chunk's part of that gradient occupies the memory of the bfloat16 one.
    """
    w = weight_bytes(config)
    logits = min(tokens.total, logits_chunk_rows(_vocabulary(config))) * _vocabulary(config) * w
    return logits + (4 * _vocabulary(config) * config.model.hidden_size if w == 2 else 0)


def _vocabulary(config: RunConfig) -> int:
    return config.model.vocab_size // config.parallel.tensor_parallel_size


def stage_activations(
    config: RunConfig, stage: int, num_micro_batches: int, *, on_cpu: bool = False
) -> tuple[float, int]:
    """Return the most bytes that a pipeline stage keeps, and of how many micro-batches (1F1B) or micro-batches of a
    chunk (interleaved)."""
    parallel, tokens = config.parallel, token_counts(config)
    stages, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    chunks = stage_layers(config.model.num_hidden_layers, stages, virtual)[stage]
    dense = sum(saved.bytes for saved in layer_activations(config, tokens, with_experts=False, on_cpu=on_cpu))
    mixture = sum(saved.bytes for saved in layer_activations(config, tokens, with_experts=True, on_cpu=on_cpu))
    first_mixture = config.model.first_k_dense_replace
    chunk_bytes = [sum(dense if layer < first_mixture else mixture for layer in chunk) for chunk in chunks]
    # A layer's backward pass holds the recomputed layer in full. By then the head's activations are freed.
    recomputed = max(
        (_recomputed_bytes(config, tokens, layer >= first_mixture, on_cpu) for chunk in chunks for layer in chunk),
        default=0.0,
    )
    if stage == stages - 1:
        head = sum(saved.bytes for saved in head_activations(config, tokens))
        chunk_bytes[-1] += head
        recomputed = max(0.0, recomputed - head)
    in_flight = micro_batches_in_flight(stages, virtual, stage, num_micro_batches)
    # Interleaved stages pass `stages` micro-batches through one chunk, then through the next chunk.
    kept = recomputed + sum(chunk_bytes[index % (stages * virtual) // stages] for index in range(in_flight))
    batches_in_flight = min(in_flight, num_micro_batches) if config.data.reset_positions else 1
    # Every pass through a chunk keeps a mask. If layers are recomputed, only the newest pass holds one.
    masks = 1 if "layer" in config.train.recompute_modules else in_flight
    shared = batches_in_flight * angles_bytes(config, tokens) + masks * mask_bytes(config, tokens, on_cpu=on_cpu)
    return kept + shared, in_flight


def _recomputed_bytes(config: RunConfig, tokens: TokenCounts, with_experts: bool, on_cpu: bool) -> float:
    """Return bytes of a layer that its forward pass does not keep and its backward pass recomputes."""
    kept = layer_activations(config, tokens, with_experts=with_experts, on_cpu=on_cpu)
    needed = _all_activations(config, tokens, with_experts, on_cpu)
    return sum(saved.bytes for saved in needed) - sum(saved.bytes for saved in kept)


def micro_batches_in_flight(stages: int, virtual: int, stage: int, num_micro_batches: int) -> int:
    """Return the maximum number of chunk forward passes that await their backward pass in Megatron's schedules."""
    ahead = stages - stage - 1
    if virtual > 1:
        ahead = 2 * ahead + (virtual - 1) * stages
    return min(ahead + 1, num_micro_batches * virtual)


def residual_bytes(config: RunConfig) -> int:
    """Return bytes of one element of the residual stream."""
    return 4 if config.train.fp32_residual_connection else weight_bytes(config)


def _norm(name: str, tokens: float, width: int, kept: int) -> SavedActivation:
    """A norm keeps its input, `kept` bytes per element, and 1 / RMS in float32."""
    return SavedActivation(name, tokens * (kept * width + 4))
