"""Map checkpoint tensors to Hugging Face tensors, with one table for both directions.

A checkpoint holds global tensors under Megatron's names, independent of the layout that wrote them. Most are one
Hugging Face tensor. The first projection of a SwiGLU holds gate over up; a projection of routed experts holds all
experts. So every Hugging Face tensor is a rectangular block of one checkpoint tensor. `moonlight.model.shards`
transposes experts to the model's layout. This module imports neither Megatron nor torch: callers apply the indices.
"""

from dataclasses import dataclass, replace

from moonlight.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class HFTensor:
    """One Hugging Face tensor: `checkpoint_tensor[index]`."""

    name: str
    shape: tuple[int, ...]
    """Shape in the Hugging Face checkpoint."""
    index: tuple[int | slice, ...] = ()
    """Index into the checkpoint tensor; empty for all of it."""
    init_kind: str = "matrix"
    """matrix (initialized from a normal distribution), norm (ones) or bias (zeros, always float32)."""


@dataclass(frozen=True, kw_only=True)
class TensorMapping:
    """One checkpoint tensor and the Hugging Face tensors it holds."""

    key: str
    shape: tuple[int, ...]
    hf_tensors: tuple[HFTensor, ...]


def _same(key: str, name: str, *shape: int, kind: str = "matrix") -> TensorMapping:
    return TensorMapping(key=key, shape=shape, hf_tensors=(HFTensor(name=name, shape=shape, init_kind=kind),))


def _gate_up(key: str, prefix: str, width: int, hidden: int) -> TensorMapping:
    hf_tensors = tuple(
        HFTensor(name=f"{prefix}.{name}.weight", shape=(width, hidden), index=(slice(start, start + width),))
        for name, start in (("gate_proj", 0), ("up_proj", width))
    )
    return TensorMapping(key=key, shape=(2 * width, hidden), hf_tensors=hf_tensors)


def _experts(key: str, prefix: str, name: str, count: int, rows: int, columns: int) -> TensorMapping:
    hf_tensors = tuple(
        HFTensor(name=f"{prefix}.{expert}.{name}.weight", shape=(rows, columns), index=(expert,))
        for expert in range(count)
    )
    return TensorMapping(key=f"{key}.{name}", shape=(count, rows, columns), hf_tensors=hf_tensors)


def _attention(model_config: ModelConfig, key: str, name: str) -> list[TensorMapping]:
    hidden, heads = model_config.hidden_size, model_config.num_attention_heads
    q_width = heads * (model_config.qk_nope_head_dim + model_config.qk_rope_head_dim)
    if model_config.q_lora_rank is None:
        mappings = [_same(f"{key}.linear_q_proj.weight", f"{name}.q_proj.weight", q_width, hidden)]
    else:
        rank = model_config.q_lora_rank
        mappings = [
            _same(f"{key}.linear_q_down_proj.weight", f"{name}.q_a_proj.weight", rank, hidden),
            _same(f"{key}.q_layernorm.weight", f"{name}.q_a_layernorm.weight", rank, kind="norm"),
            _same(f"{key}.linear_q_up_proj.weight", f"{name}.q_b_proj.weight", q_width, rank),
        ]
    rank = model_config.kv_lora_rank
    kv_down_width = rank + model_config.qk_rope_head_dim
    kv_width = heads * (model_config.qk_nope_head_dim + model_config.v_head_dim)
    return [
        *mappings,
        _same(f"{key}.linear_kv_down_proj.weight", f"{name}.kv_a_proj_with_mqa.weight", kv_down_width, hidden),
        _same(f"{key}.kv_layernorm.weight", f"{name}.kv_a_layernorm.weight", rank, kind="norm"),
        _same(f"{key}.linear_kv_up_proj.weight", f"{name}.kv_b_proj.weight", kv_width, rank),
        _same(f"{key}.linear_proj.weight", f"{name}.o_proj.weight", hidden, heads * model_config.v_head_dim),
    ]


def _moe(model_config: ModelConfig, key: str, name: str) -> list[TensorMapping]:
    hidden, width, count = model_config.hidden_size, model_config.moe_intermediate_size, model_config.num_experts
    shared = width * model_config.num_shared_experts
    return [
        _same(f"{key}.router.weight", f"{name}.gate.weight", count, hidden),
        _same(f"{key}.router.expert_bias", f"{name}.gate.e_score_correction_bias", count, kind="bias"),
        _experts(f"{key}.experts", f"{name}.experts", "gate_proj", count, width, hidden),
        _experts(f"{key}.experts", f"{name}.experts", "up_proj", count, width, hidden),
        _experts(f"{key}.experts", f"{name}.experts", "down_proj", count, hidden, width),
        _gate_up(f"{key}.shared_experts.linear_fc1.weight", f"{name}.shared_experts", shared, hidden),
        _same(f"{key}.shared_experts.linear_fc2.weight", f"{name}.shared_experts.down_proj.weight", hidden, shared),
    ]


def tensor_mappings(model_config: ModelConfig) -> list[TensorMapping]:
    """Return the mapping of every tensor of the model, in the order of a Hugging Face checkpoint."""
    hidden = model_config.hidden_size
    mappings = [_same("embedding.word_embeddings.weight", "model.embed_tokens.weight", model_config.vocab_size, hidden)]
    for layer in range(model_config.num_hidden_layers):
        key, name = f"decoder.layers.{layer}", f"model.layers.{layer}"
        mappings += [
            _same(f"{key}.input_layernorm.weight", f"{name}.input_layernorm.weight", hidden, kind="norm"),
            *_attention(model_config, f"{key}.self_attention", f"{name}.self_attn"),
            _same(f"{key}.pre_mlp_layernorm.weight", f"{name}.post_attention_layernorm.weight", hidden, kind="norm"),
        ]
        if layer < model_config.first_k_dense_replace:
            width = model_config.intermediate_size
            mappings += [
                _gate_up(f"{key}.mlp.linear_fc1.weight", f"{name}.mlp", width, hidden),
                _same(f"{key}.mlp.linear_fc2.weight", f"{name}.mlp.down_proj.weight", hidden, width),
            ]
        else:
            mappings += _moe(model_config, f"{key}.mlp", f"{name}.mlp")
    mappings.append(_same("decoder.final_layernorm.weight", "model.norm.weight", hidden, kind="norm"))
    if not model_config.tie_word_embeddings:
        mappings.append(_same("output_layer.weight", "lm_head.weight", model_config.vocab_size, hidden))
    return mappings


def offset_and_sizes(hf_tensor: HFTensor, mapping: TensorMapping) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return offset and sizes of `hf_tensor` in its checkpoint tensor, with one entry for each of that one's axes."""
    offset, sizes = [], []
    for axis, size in enumerate(mapping.shape):
        index = hf_tensor.index[axis] if axis < len(hf_tensor.index) else slice(0, size)
        start, stop = (index, index + 1) if isinstance(index, int) else (index.start, index.stop)
        offset.append(start)
        sizes.append(stop - start)
    return tuple(offset), tuple(sizes)


def slice_rows(hf_tensor: HFTensor, start: int, stop: int) -> HFTensor:
    """Return rows `start` to `stop` (exclusive) of a Hugging Face tensor, as an HFTensor of the same name."""
    slice_axes = (axis for axis, index in enumerate(hf_tensor.index) if isinstance(index, slice))
    axis = next(slice_axes, len(hf_tensor.index))
    full = hf_tensor.index[axis] if axis < len(hf_tensor.index) else slice(0, hf_tensor.shape[0])
    assert isinstance(full, slice) and axis >= len(hf_tensor.index) - 1, hf_tensor
    index = (*hf_tensor.index[:axis], slice(full.start + start, full.start + stop))
    return replace(hf_tensor, shape=(stop - start, *hf_tensor.shape[1:]), index=index)


def overlap(
    hf_tensor: HFTensor, mapping: TensorMapping, offset: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[int | slice, ...]] | None:
    """Return the indices at which `hf_tensor` and a chunk of its checkpoint tensor overlap; None if they do not.

    The first index is into the Hugging Face tensor, which lacks the expert axis of a stack; the second into the chunk.

    Args:
        offset: offset of the chunk in the checkpoint tensor.
        sizes: sizes of the chunk.
    """
    hf_index: list[slice] = []
    chunk_index: list[int | slice] = []
    for axis, (hf_start, hf_size, chunk_start, chunk_size) in enumerate(
        zip(*offset_and_sizes(hf_tensor, mapping), offset, sizes, strict=True)
    ):
        start, stop = max(hf_start, chunk_start), min(hf_start + hf_size, chunk_start + chunk_size)
        if start >= stop:
            return None
        if axis < len(hf_tensor.index) and isinstance(hf_tensor.index[axis], int):
            chunk_index.append(start - chunk_start)
        else:
            chunk_index.append(slice(start - chunk_start, stop - chunk_start))
            hf_index.append(slice(start - hf_start, stop - hf_start))
    return tuple(hf_index), tuple(chunk_index)
