"""Activations: what autograd keeps of one micro-batch until its backward pass, operation by operation.

`tests/plan/test_activations.py` compares with what a real forward pass keeps. A CPU differs from a GPU in two places:
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
    """The one of `train.recompute_modules` that makes it again instead."""


@dataclass(frozen=True)
class TokenCounts:
    """Of one micro-batch on one rank."""

    total: int
    """Of its sequences, which tensor-parallel ranks have in common."""
    local: float
    """A rank's part of them under sequence parallelism."""
    sequence_length: int
    expert_pairs: float
    """Tokens times experts that reach this rank's experts; uniform routing gives every expert the same."""


def token_counts(config: RunConfig, pairs: float | None = None) -> TokenCounts:
    """Tokens of a micro-batch; `pairs` as measured, or as uniform routing has them."""
    parallel, length = config.parallel, config.data.sequence_length
    whole = config.train.micro_batch_size * length
    own = whole / parallel.tensor_parallel_size
    if pairs is None:
        pairs = own * config.model.num_experts_per_tok * parallel.expert_tensor_parallel_size
    return TokenCounts(whole, own, length, pairs)


def layer_activations(
    config: RunConfig, tokens: TokenCounts, *, with_experts: bool, on_cpu: bool = False
) -> Iterator[SavedActivation]:
    """What a layer keeps, operation by operation. w: bytes of a weight's dtype; float32 takes 4, int64 takes 8.

    What several operations keep is one tensor and stands once, where it is made.
    """
    again = config.train.recompute_modules
    if "layer" in again:
        yield SavedActivation("input of the layer", tokens.local * config.model.hidden_size * residual_bytes(config))
        return
    for saved in _everything(config, tokens, with_experts, on_cpu):
        if saved.recomputed_by not in again:
            yield saved


def _everything(config: RunConfig, tokens: TokenCounts, with_experts: bool, on_cpu: bool) -> Iterator[SavedActivation]:
    model_config, tp, w = config.model, config.parallel.tensor_parallel_size, weight_bytes(config)
    hidden, heads = model_config.hidden_size, model_config.num_attention_heads / tp
    own, whole = tokens.local, tokens.total
    nope, rope, value = model_config.qk_nope_head_dim, model_config.qk_rope_head_dim, model_config.v_head_dim

    yield _norm("input_layernorm", own, hidden, residual_bytes(config))
    yield SavedActivation("input of the down-projections (or q_proj)", own * w * hidden, "layernorm")
    if model_config.q_lora_rank is not None:
        yield _norm("q_layernorm", own, model_config.q_lora_rank, w)
        yield SavedActivation("input of q_up_proj", own * w * model_config.q_lora_rank)
    # Its input lies beside the rope key, and values beside keys without rope; autograd keeps both whole.
    yield _norm("kv_layernorm", own, model_config.kv_lora_rank + rope, w)
    yield SavedActivation("input of kv_up_proj", own * w * model_config.kv_lora_rank)
    yield SavedActivation(
        "queries, keys and values", whole * heads * w * (2 * (nope + rope) + nope + value), "mla_up_proj"
    )
    # A CPU's has its result by head, and the projection its input by token.
    yield SavedActivation(
        "attention: output, and 4 bytes a head", whole * heads * (w * value * (2 if on_cpu else 1) + 4)
    )
    yield _norm("pre_mlp_layernorm", own, hidden, residual_bytes(config))
    yield SavedActivation("input of the MLP", own * w * hidden, "layernorm")
    if not with_experts:
        width = model_config.intermediate_size / tp
        yield SavedActivation("dense MLP: gate and up", whole * w * 2 * width)
        yield SavedActivation("dense MLP: activation", whole * w * width, "mlp_act")
        return
    width = model_config.moe_intermediate_size * model_config.num_shared_experts / tp
    yield SavedActivation("shared experts: gate and up", whole * w * 2 * width)
    yield SavedActivation("shared experts: activation", whole * w * width, "mlp_act")
    if w == 2:
        yield SavedActivation("router: input and weight in float32", 4 * hidden * (own + model_config.num_experts))
    num_experts, chosen = model_config.num_experts, model_config.num_experts_per_tok
    yield SavedActivation("router: scores, choice and sums", own * (4 * num_experts + 8 * chosen + 4 * chosen + 8))
    if model_config.aux_loss_alpha > 0:
        yield SavedActivation("router: loads of its loss", 4 * config.train.micro_batch_size * num_experts)
    expert_ranks = config.parallel.expert_parallel_size * config.parallel.expert_tensor_parallel_size
    if expert_ranks > 1:
        yield SavedActivation("dispatch: probabilities, map and order", own * (5 * num_experts + 8 * chosen))
        yield SavedActivation("experts: input", tokens.expert_pairs * w * hidden)
    local = num_experts // config.parallel.expert_parallel_size
    # Every expert's run begins at a multiple of the alignment: room for the largest gaps is always taken.
    places = tokens.expert_pairs + (
        local * (EXPERT_ROW_ALIGNMENT["cpu" if on_cpu else "cuda"] - 1) if tokens.expert_pairs else 0
    )
    yield SavedActivation("experts: probabilities and order", tokens.expert_pairs * (4 + 8) + places * 8 + local * 4)
    width = model_config.moe_intermediate_size / config.parallel.expert_tensor_parallel_size
    yield SavedActivation("experts: gate and up", places * w * 2 * width)


def angles_bytes(config: RunConfig, tokens: TokenCounts) -> int:
    """Cosines and sines of the rotary embedding, which all layers have in common: float32, of every place in a
    sequence, or of every token where documents have positions of their own."""
    places = tokens.total if config.data.reset_positions else tokens.sequence_length
    return places * 2 * 4 * config.model.qk_rope_head_dim


def mask_bytes(config: RunConfig, tokens: TokenCounts, *, on_cpu: bool = False) -> int:
    """The mask of documents, which all layers of a pass have in common: an addend to every logit of a head."""
    return (
        0 if on_cpu or not config.data.mask_documents else tokens.total * tokens.sequence_length * weight_bytes(config)
    )


def head_activations(config: RunConfig, tokens: TokenCounts) -> Iterator[SavedActivation]:
    """What the last stage keeps besides its layers. The loss keeps gradients, and neither its input nor logits."""
    hidden, w = config.model.hidden_size, weight_bytes(config)
    yield _norm("final_layernorm", tokens.local, hidden, residual_bytes(config))
    yield SavedActivation("gradient of the head's input", tokens.total * w * hidden)
    yield SavedActivation("gradient of the head", _vocabulary(config) * w * hidden)


def loss_workspace(config: RunConfig, tokens: TokenCounts) -> float:
    """What is there besides while the loss is made: a chunk of logits, and the head's gradient in float32 where it is
    kept in bfloat16 (whose place a chunk's part of it has until then)."""
    w = weight_bytes(config)
    logits = min(tokens.total, logits_chunk_rows(_vocabulary(config))) * _vocabulary(config) * w
    return logits + (4 * _vocabulary(config) * config.model.hidden_size if w == 2 else 0)


def _vocabulary(config: RunConfig) -> int:
    return config.model.vocab_size // config.parallel.tensor_parallel_size


def stage_activations(
    config: RunConfig, stage: int, num_micro_batches: int, *, on_cpu: bool = False
) -> tuple[float, int]:
    """Bytes that a pipeline stage keeps at most, and of how many micro-batches of a chunk (1F1B, or interleaved)."""
    parallel, tokens = config.parallel, token_counts(config)
    stages, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    chunks = stage_layers(config.model.num_hidden_layers, stages, virtual)[stage]
    dense = sum(saved.bytes for saved in layer_activations(config, tokens, with_experts=False, on_cpu=on_cpu))
    mixture = sum(saved.bytes for saved in layer_activations(config, tokens, with_experts=True, on_cpu=on_cpu))
    first_mixture = config.model.first_k_dense_replace
    of_chunk = [sum(dense if layer < first_mixture else mixture for layer in chunk) for chunk in chunks]
    # A layer's backward pass has all of the layer, made again; the head's is over then.
    made_again = max(
        (_made_again(config, tokens, layer >= first_mixture, on_cpu) for chunk in chunks for layer in chunk),
        default=0.0,
    )
    if stage == stages - 1:
        head = sum(saved.bytes for saved in head_activations(config, tokens))
        of_chunk[-1] += head
        made_again = max(0.0, made_again - head)
    in_flight = micro_batches_in_flight(stages, virtual, stage, num_micro_batches)
    # Interleaved stages take as many micro-batches as there are stages through one chunk, then the next chunk.
    kept = made_again + sum(of_chunk[number % (stages * virtual) // stages] for number in range(in_flight))
    batches_in_flight = min(in_flight, num_micro_batches) if config.data.reset_positions else 1
    # Every pass through a chunk keeps a mask; the newest pass's is there even if layers are made again.
    masks = 1 if "layer" in config.train.recompute_modules else in_flight
    shared = batches_in_flight * angles_bytes(config, tokens) + masks * mask_bytes(config, tokens, on_cpu=on_cpu)
    return kept + shared, in_flight


def _made_again(config: RunConfig, tokens: TokenCounts, with_experts: bool, on_cpu: bool) -> float:
    """Bytes of a layer that are not kept, but there while its backward pass goes on."""
    kept = layer_activations(config, tokens, with_experts=with_experts, on_cpu=on_cpu)
    everything = _everything(config, tokens, with_experts, on_cpu)
    return sum(saved.bytes for saved in everything) - sum(saved.bytes for saved in kept)


def micro_batches_in_flight(stages: int, virtual: int, stage: int, num_micro_batches: int) -> int:
    """Forward passes of chunks that await their backward pass at most, as Megatron's schedules warm up."""
    ahead = stages - stage - 1
    if virtual > 1:
        ahead = 2 * ahead + (virtual - 1) * stages
    return min(ahead + 1, num_micro_batches * virtual)


def residual_bytes(config: RunConfig) -> int:
    """Of one element of the residual stream."""
    return 4 if config.train.fp32_residual_connection else weight_bytes(config)


def _norm(name: str, tokens: float, width: int, kept: int) -> SavedActivation:
    """Its input, `kept` bytes an element, and 1 / RMS in float32."""
    return SavedActivation(name, tokens * (kept * width + 4))
