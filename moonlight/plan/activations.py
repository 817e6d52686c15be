"""Activations: what autograd keeps of one micro-batch until its backward pass, operation by operation.

`tests/plan/test_activations.py` compares with what a real forward pass keeps. A CPU differs from a GPU in two places:
attention (`moonlight/model/cpu_attention.py`), and the rows of each expert, which a CPU pads to more tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moonlight.config.pipeline import layers_of_stages
from moonlight.config.run import Run
from moonlight.kernels.chunk_sizes import ALIGNMENT, rows_of_logits
from moonlight.placement.comm_bytes import weight_bytes


@dataclass(frozen=True)
class Saved:
    """Bytes that one operation keeps of one micro-batch on one rank."""

    operation: str
    bytes: float
    made_by: str = ""
    """The one of `train.recompute_modules` that makes it again instead."""


@dataclass(frozen=True)
class Tokens:
    """Of one micro-batch on one rank."""

    whole: int
    """Of its sequences, which tensor-parallel ranks have in common."""
    own: float
    """A rank's part of them under sequence parallelism."""
    sequence_length: int
    pairs: float
    """Tokens times experts that reach this rank's experts; uniform routing gives every expert the same."""


def tokens_of(run: Run, pairs: float | None = None) -> Tokens:
    """Tokens of a micro-batch; `pairs` as measured, or as uniform routing has them."""
    parallel, length = run.parallel, run.data.sequence_length
    whole = run.train.micro_batch_size * length
    own = whole / parallel.tensor_parallel_size
    if pairs is None:
        pairs = own * run.model.num_experts_per_tok * parallel.expert_tensor_parallel_size
    return Tokens(whole, own, length, pairs)


def layer_activations(run: Run, tokens: Tokens, *, with_experts: bool, on_cpu: bool = False) -> Iterator[Saved]:
    """What a layer keeps, operation by operation. w: bytes of a weight's dtype; float32 takes 4, int64 takes 8.

    What several operations keep is one tensor and stands once, where it is made.
    """
    again = run.train.recompute_modules
    if "layer" in again:
        yield Saved("input of the layer", tokens.own * run.model.hidden_size * residual_bytes(run))
        return
    for saved in _everything(run, tokens, with_experts, on_cpu):
        if saved.made_by not in again:
            yield saved


def _everything(run: Run, tokens: Tokens, with_experts: bool, on_cpu: bool) -> Iterator[Saved]:
    model, tp, w = run.model, run.parallel.tensor_parallel_size, weight_bytes(run)
    hidden, heads = model.hidden_size, model.num_attention_heads / tp
    own, whole = tokens.own, tokens.whole
    nope, rope, value = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim

    yield _norm("input_layernorm", own, hidden, residual_bytes(run))
    yield Saved("input of the down-projections (or q_proj)", own * w * hidden, "layernorm")
    if model.q_lora_rank is not None:
        yield _norm("q_layernorm", own, model.q_lora_rank, w)
        yield Saved("input of q_up_proj", own * w * model.q_lora_rank)
    # Its input lies beside the rope key, and values beside keys without rope; autograd keeps both whole.
    yield _norm("kv_layernorm", own, model.kv_lora_rank + rope, w)
    yield Saved("input of kv_up_proj", own * w * model.kv_lora_rank)
    yield Saved("queries, keys and values", whole * heads * w * (2 * (nope + rope) + nope + value), "mla_up_proj")
    # A CPU's has its result by head, and the projection its input by token.
    yield Saved("attention: output, and 4 bytes a head", whole * heads * (w * value * (2 if on_cpu else 1) + 4))
    yield _norm("pre_mlp_layernorm", own, hidden, residual_bytes(run))
    yield Saved("input of the MLP", own * w * hidden, "layernorm")
    if not with_experts:
        width = model.intermediate_size / tp
        yield Saved("dense MLP: gate and up", whole * w * 2 * width)
        yield Saved("dense MLP: activation", whole * w * width, "mlp_act")
        return
    width = model.moe_intermediate_size * model.num_shared_experts / tp
    yield Saved("shared experts: gate and up", whole * w * 2 * width)
    yield Saved("shared experts: activation", whole * w * width, "mlp_act")
    if w == 2:
        yield Saved("router: input and weight in float32", 4 * hidden * (own + model.num_experts))
    num_experts, chosen = model.num_experts, model.num_experts_per_tok
    yield Saved("router: scores, choice and sums", own * (4 * num_experts + 8 * chosen + 4 * chosen + 8))
    if model.aux_loss_alpha > 0:
        yield Saved("router: loads of its loss", 4 * run.train.micro_batch_size * num_experts)
    expert_ranks = run.parallel.expert_parallel_size * run.parallel.expert_tensor_parallel_size
    if expert_ranks > 1:
        yield Saved("dispatch: probabilities, map and order", own * (5 * num_experts + 8 * chosen))
        yield Saved("experts: input", tokens.pairs * w * hidden)
    local = num_experts // run.parallel.expert_parallel_size
    # Every expert's run begins at a multiple of the alignment: room for the largest gaps is always taken.
    places = tokens.pairs + (local * (ALIGNMENT["cpu" if on_cpu else "cuda"] - 1) if tokens.pairs else 0)
    yield Saved("experts: probabilities and order", tokens.pairs * (4 + 8) + places * 8 + local * 4)
    width = model.moe_intermediate_size / run.parallel.expert_tensor_parallel_size
    yield Saved("experts: gate and up", places * w * 2 * width)


def angles_bytes(run: Run, tokens: Tokens) -> int:
    """Cosines and sines of the rotary embedding, which all layers have in common: float32, of every place in a
    sequence, or of every token where documents have positions of their own."""
    places = tokens.whole if run.data.reset_positions else tokens.sequence_length
    return places * 2 * 4 * run.model.qk_rope_head_dim


def mask_bytes(run: Run, tokens: Tokens, *, on_cpu: bool = False) -> int:
    """The mask of documents, which all layers of a pass have in common: an addend to every logit of a head."""
    return 0 if on_cpu or not run.data.mask_documents else tokens.whole * tokens.sequence_length * weight_bytes(run)


def head_activations(run: Run, tokens: Tokens) -> Iterator[Saved]:
    """What the last stage keeps besides its layers. The loss keeps gradients, and neither its input nor logits."""
    hidden, w = run.model.hidden_size, weight_bytes(run)
    yield _norm("final_layernorm", tokens.own, hidden, residual_bytes(run))
    yield Saved("gradient of the head's input", tokens.whole * w * hidden)
    yield Saved("gradient of the head", _vocabulary(run) * w * hidden)


def loss_workspace(run: Run, tokens: Tokens) -> float:
    """What is there besides while the loss is made: a chunk of logits, and the head's gradient in float32 where it is
    kept in bfloat16 (whose place a chunk's part of it has until then)."""
    w = weight_bytes(run)
    logits = min(tokens.whole, rows_of_logits(_vocabulary(run))) * _vocabulary(run) * w
    return logits + (4 * _vocabulary(run) * run.model.hidden_size if w == 2 else 0)


def _vocabulary(run: Run) -> int:
    return run.model.vocab_size // run.parallel.tensor_parallel_size


def stage_activations(run: Run, stage: int, num_micro_batches: int, *, on_cpu: bool = False) -> tuple[float, int]:
    """Bytes that a pipeline stage keeps at most, and of how many micro-batches of a chunk (1F1B, or interleaved)."""
    parallel, tokens = run.parallel, tokens_of(run)
    stages, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    chunks = layers_of_stages(run.model.num_hidden_layers, stages, virtual)[stage]
    dense = sum(saved.bytes for saved in layer_activations(run, tokens, with_experts=False, on_cpu=on_cpu))
    mixture = sum(saved.bytes for saved in layer_activations(run, tokens, with_experts=True, on_cpu=on_cpu))
    first_mixture = run.model.first_k_dense_replace
    of_chunk = [sum(dense if layer < first_mixture else mixture for layer in chunk) for chunk in chunks]
    # A layer's backward pass has all of the layer, made again; the head's is over then.
    made_again = max(
        (_made_again(run, tokens, layer >= first_mixture, on_cpu) for chunk in chunks for layer in chunk), default=0.0
    )
    if stage == stages - 1:
        head = sum(saved.bytes for saved in head_activations(run, tokens))
        of_chunk[-1] += head
        made_again = max(0.0, made_again - head)
    in_flight = micro_batches_in_flight(stages, virtual, stage, num_micro_batches)
    # Interleaved stages take as many micro-batches as there are stages through one chunk, then the next chunk.
    kept = made_again + sum(of_chunk[number % (stages * virtual) // stages] for number in range(in_flight))
    batches_in_flight = min(in_flight, num_micro_batches) if run.data.reset_positions else 1
    # Every pass through a chunk keeps a mask; the newest pass's is there even if layers are made again.
    masks = 1 if "layer" in run.train.recompute_modules else in_flight
    shared = batches_in_flight * angles_bytes(run, tokens) + masks * mask_bytes(run, tokens, on_cpu=on_cpu)
    return kept + shared, in_flight


def _made_again(run: Run, tokens: Tokens, with_experts: bool, on_cpu: bool) -> float:
    """Bytes of a layer that are not kept, but there while its backward pass goes on."""
    kept = layer_activations(run, tokens, with_experts=with_experts, on_cpu=on_cpu)
    everything = _everything(run, tokens, with_experts, on_cpu)
    return sum(saved.bytes for saved in everything) - sum(saved.bytes for saved in kept)


def micro_batches_in_flight(stages: int, virtual: int, stage: int, num_micro_batches: int) -> int:
    """Forward passes of chunks that await their backward pass at most, as Megatron's schedules warm up."""
    ahead = stages - stage - 1
    if virtual > 1:
        ahead = 2 * ahead + (virtual - 1) * stages
    return min(ahead + 1, num_micro_batches * virtual)


def residual_bytes(run: Run) -> int:
    """Of one element of the residual stream."""
    return 4 if run.train.fp32_residual_connection else weight_bytes(run)


def _norm(name: str, tokens: float, width: int, kept: int) -> Saved:
    """Its input, `kept` bytes an element, and 1 / RMS in float32."""
    return Saved(name, tokens * (kept * width + 4))
