"""Activations: what autograd keeps of one micro-batch until its backward pass, operation by operation.

`tests/test_activations.py` compares with what a real forward pass keeps. CUDA's kernels keep less than a CPU's in one
place: a CPU composes RMSNorm of parts and keeps the normalised input besides.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moonlight.config import Run
from moonlight.optim.shares import weight_bytes
from moonlight.pipeline import layers_of_stages


@dataclass(frozen=True)
class Saved:
    """Bytes that one operation keeps of one micro-batch on one rank."""

    operation: str
    bytes: float


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
    model, tp, w = run.model, run.parallel.tensor_parallel_size, weight_bytes(run)
    hidden, heads = model.hidden_size, model.num_attention_heads / tp
    own, whole = tokens.own, tokens.whole
    key, value = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim

    yield _norm("input_layernorm", own, hidden, hidden, w, on_cpu)
    yield Saved("input of the down-projections (or q_proj)", own * w * hidden)
    if model.q_lora_rank is not None:
        yield _norm("q_layernorm", own, model.q_lora_rank, model.q_lora_rank, w, on_cpu)
        yield Saved("input of q_up_proj", own * w * model.q_lora_rank)
    # A float32 norm keeps its input where it lies: beside the rope key.
    kv_input = model.kv_lora_rank + (model.qk_rope_head_dim if w == 4 else 0)
    yield _norm("kv_layernorm", own, kv_input, model.kv_lora_rank, w, on_cpu)
    yield Saved("input of kv_up_proj", own * w * model.kv_lora_rank)
    angles = tokens.whole if run.data.reset_positions else tokens.sequence_length
    yield Saved("cosines and sines of queries and keys", angles * 4 * w * model.qk_rope_head_dim)
    yield Saved("queries, keys and values", whole * heads * w * (2 * key + value))
    yield Saved("attention: output, and 4 bytes a head", whole * heads * (w * value + 4))
    if run.data.mask_documents:
        yield Saved("attention: mask of documents", whole * tokens.sequence_length * w)
    yield _norm("pre_mlp_layernorm", own, hidden, hidden, w, on_cpu)
    yield Saved("input of the MLP", own * w * hidden)
    if not with_experts:
        yield Saved("dense SwiGLU", whole * w * 5 * model.intermediate_size / tp)
        return
    yield Saved("shared SwiGLU", whole * w * 5 * model.moe_intermediate_size * model.num_shared_experts / tp)
    if w == 2:
        yield Saved("router: input and weight in float32", 4 * hidden * (own + model.num_experts))
    chosen = model.num_experts_per_tok
    yield Saved("router: scores, choice and sums", own * (4 * model.num_experts + 8 * chosen + 4 * chosen + 8))
    yield Saved("dispatch: probabilities, map and order", own * (5 * model.num_experts + 8 * chosen))
    width = model.moe_intermediate_size / run.parallel.expert_tensor_parallel_size
    yield Saved("experts: input and probabilities", tokens.pairs * w * (hidden + 1))
    yield Saved("experts: SwiGLU", tokens.pairs * w * 5 * width)


def head_activations(run: Run, tokens: Tokens, *, on_cpu: bool = False) -> Iterator[Saved]:
    """What the last stage keeps besides its layers."""
    model, w = run.model, weight_bytes(run)
    yield _norm("final_layernorm", tokens.own, model.hidden_size, model.hidden_size, w, on_cpu)
    yield Saved("input of the head", tokens.own * w * model.hidden_size)
    vocabulary = model.vocab_size / run.parallel.tensor_parallel_size
    yield Saved("loss: softmax in float32, masks and labels", tokens.whole * (4 * vocabulary + 9))


def logits_bytes(run: Run, tokens: Tokens) -> float:
    """Logits in the model's dtype, beside their float32 copy while the loss is made; a float32 model has one of them.
    Their gradient takes the same place later."""
    w = weight_bytes(run)
    return tokens.whole * w * run.model.vocab_size / run.parallel.tensor_parallel_size if w == 2 else 0


def stage_activations(run: Run, stage: int, num_micro_batches: int, *, on_cpu: bool = False) -> tuple[float, int]:
    """Bytes that a pipeline stage keeps at most, and of how many micro-batches of a chunk (1F1B, or interleaved)."""
    parallel, tokens = run.parallel, tokens_of(run)
    stages, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    chunks = layers_of_stages(run.model.num_hidden_layers, stages, virtual)[stage]
    dense = sum(saved.bytes for saved in layer_activations(run, tokens, with_experts=False, on_cpu=on_cpu))
    mixture = sum(saved.bytes for saved in layer_activations(run, tokens, with_experts=True, on_cpu=on_cpu))
    first_mixture = run.model.first_k_dense_replace
    of_chunk = [sum(dense if layer < first_mixture else mixture for layer in chunk) for chunk in chunks]
    if weight_bytes(run) == 2 and not run.train.fp32_residual_connection:
        # What came from the stage before is kept in bfloat16, beside the float32 that the first norm keeps.
        for number in range(virtual):
            if stage > 0 or number > 0:
                of_chunk[number] += tokens.own * 2 * run.model.hidden_size
    if stage == stages - 1:
        of_chunk[-1] += sum(saved.bytes for saved in head_activations(run, tokens, on_cpu=on_cpu))
    in_flight = micro_batches_in_flight(stages, virtual, stage, num_micro_batches)
    # Interleaved stages take as many micro-batches as there are stages through one chunk, then the next chunk.
    return sum(of_chunk[number % (stages * virtual) // stages] for number in range(in_flight)), in_flight


def micro_batches_in_flight(stages: int, virtual: int, stage: int, num_micro_batches: int) -> int:
    """Forward passes of chunks that await their backward pass at most, as Megatron's schedules warm up."""
    ahead = stages - stage - 1
    if virtual > 1:
        ahead = 2 * ahead + (virtual - 1) * stages
    return min(ahead + 1, num_micro_batches * virtual)


def _norm(name: str, tokens: float, kept: int, width: int, w: int, on_cpu: bool) -> Saved:
    """Its input and 1 / RMS in float32, and a float32 copy of bfloat16 gains; on a CPU the normalised input besides."""
    return Saved(name, tokens * (4 * kept + 4 + (4 * width if on_cpu else 0)) + (4 * width if w == 2 else 0))
