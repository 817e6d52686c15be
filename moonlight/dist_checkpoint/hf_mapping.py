"""One table between the tensors of a checkpoint and those of a Hugging Face folder, read both ways.

A checkpoint holds whole tensors under Megatron's names, whatever layout wrote them. Most are one Hugging Face tensor;
the first projection of a SwiGLU holds gate over up; a projection of routed experts holds all experts. So every Hugging
Face tensor is a rectangle of one of them (`moonlight.model.shards` turns experts the way the model has them). No import
of Megatron or torch: indices are applied by whoever holds the tensors.
"""

from dataclasses import dataclass, replace

from moonlight.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class HFTensor:
    """One Hugging Face tensor: `whole[index]` of a checkpoint tensor."""

    name: str
    shape: tuple[int, ...]
    """Shape as Hugging Face stores it."""
    index: tuple[int | slice, ...] = ()
    init_kind: str = "matrix"
    """matrix (initialised from a normal distribution), norm (ones) or bias (zeros, always float32)."""


@dataclass(frozen=True, kw_only=True)
class TensorMapping:
    """One checkpoint tensor and the Hugging Face tensors it holds."""

    key: str
    shape: tuple[int, ...]
    hf_tensors: tuple[HFTensor, ...]


def _same(key: str, name: str, *shape: int, kind: str = "matrix") -> TensorMapping:
    return TensorMapping(key=key, shape=shape, hf_tensors=(HFTensor(name=name, shape=shape, init_kind=kind),))


def _gate_up(key: str, prefix: str, width: int, hidden: int) -> TensorMapping:
    parts = tuple(
        HFTensor(name=f"{prefix}.{name}.weight", shape=(width, hidden), index=(slice(start, start + width),))
        for name, start in (("gate_proj", 0), ("up_proj", width))
    )
    return TensorMapping(key=key, shape=(2 * width, hidden), hf_tensors=parts)


def _experts(key: str, prefix: str, name: str, count: int, rows: int, columns: int) -> TensorMapping:
    parts = tuple(
        HFTensor(name=f"{prefix}.{expert}.{name}.weight", shape=(rows, columns), index=(expert,))
        for expert in range(count)
    )
    return TensorMapping(key=f"{key}.{name}", shape=(count, rows, columns), hf_tensors=parts)


def _attention(model_config: ModelConfig, key: str, name: str) -> list[TensorMapping]:
    hidden, heads = model_config.hidden_size, model_config.num_attention_heads
    q_width = heads * (model_config.qk_nope_head_dim + model_config.qk_rope_head_dim)
    if model_config.q_lora_rank is None:
        rows = [_same(f"{key}.linear_q_proj.weight", f"{name}.q_proj.weight", q_width, hidden)]
    else:
        rank = model_config.q_lora_rank
        rows = [
            _same(f"{key}.linear_q_down_proj.weight", f"{name}.q_a_proj.weight", rank, hidden),
            _same(f"{key}.q_layernorm.weight", f"{name}.q_a_layernorm.weight", rank, kind="norm"),
            _same(f"{key}.linear_q_up_proj.weight", f"{name}.q_b_proj.weight", q_width, rank),
        ]
    rank = model_config.kv_lora_rank
    kv_width = heads * (model_config.qk_nope_head_dim + model_config.v_head_dim)
    return [
        *rows,
        _same(
            f"{key}.linear_kv_down_proj.weight",
            f"{name}.kv_a_proj_with_mqa.weight",
            rank + model_config.qk_rope_head_dim,
            hidden,
        ),
        _same(f"{key}.kv_layernorm.weight", f"{name}.kv_a_layernorm.weight", rank, kind="norm"),
        _same(f"{key}.linear_kv_up_proj.weight", f"{name}.kv_b_proj.weight", kv_width, rank),
        _same(f"{key}.linear_proj.weight", f"{name}.o_proj.weight", hidden, heads * model_config.v_head_dim),
    ]


def _mixture(model_config: ModelConfig, key: str, name: str) -> list[TensorMapping]:
    hidden, width, count = model_config.hidden_size, model_config.moe_intermediate_size, model_config.num_experts
    shared = width * model_config.num_shared_experts
    return [
        _same(f"{key}.router.weight", f"{name}.gate.weight", count, hidden),
        _same(f"{key}.router.expert_bias", f"{name}.gate.e_score_correction_bias", count, kind="bias"),
        _experts(f"{key}.experts", f"{name}.experts", "gate_proj", count, width, hidden),
        _experts(f"{key}.experts", f"{name}.experts", "up_proj", count, width, hidden),
        _experts(f"{key}.experts", f"{name}.experts", "down_proj", count, hidden, width),
        _gate_up(f"{key}.shared_experts.linear_fc1.weight", f"{name}.shared_experts", shared, hidden),
        _same(
            f"{key}.shared_experts.linear_fc2.weight",
            f"{name}.shared_experts.down_proj.weight",
            hidden,
            shared,
        ),
    ]


def tensor_mappings(model_config: ModelConfig) -> list[TensorMapping]:
    """Every tensor of the model, in the order of a Hugging Face checkpoint."""
    hidden = model_config.hidden_size
    rows = [_same("embedding.word_embeddings.weight", "model.embed_tokens.weight", model_config.vocab_size, hidden)]
    for layer in range(model_config.num_hidden_layers):
        key, name = f"decoder.layers.{layer}", f"model.layers.{layer}"
        rows += [
            _same(f"{key}.input_layernorm.weight", f"{name}.input_layernorm.weight", hidden, kind="norm"),
            *_attention(model_config, f"{key}.self_attention", f"{name}.self_attn"),
            _same(
                f"{key}.pre_mlp_layernorm.weight",
                f"{name}.post_attention_layernorm.weight",
                hidden,
                kind="norm",
            ),
        ]
        if layer < model_config.first_k_dense_replace:
            width = model_config.intermediate_size
            rows += [
                _gate_up(f"{key}.mlp.linear_fc1.weight", f"{name}.mlp", width, hidden),
                _same(f"{key}.mlp.linear_fc2.weight", f"{name}.mlp.down_proj.weight", hidden, width),
            ]
        else:
            rows += _mixture(model_config, f"{key}.mlp", f"{name}.mlp")
    rows.append(_same("decoder.final_layernorm.weight", "model.norm.weight", hidden, kind="norm"))
    if not model_config.tie_word_embeddings:
        rows.append(_same("output_layer.weight", "lm_head.weight", model_config.vocab_size, hidden))
    return rows


def offset_and_sizes(part: HFTensor, row: TensorMapping) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where a part lies in its whole tensor: offset and sizes, with as many dimensions as the whole."""
    offset, sizes = [], []
    for axis, size in enumerate(row.shape):
        where = part.index[axis] if axis < len(part.index) else slice(0, size)
        low, high = (where, where + 1) if isinstance(where, int) else (where.start, where.stop)
        offset.append(low)
        sizes.append(high - low)
    return tuple(offset), tuple(sizes)


def slice_rows(part: HFTensor, start: int, stop: int) -> HFTensor:
    """Rows `begin` to `end` of a part, as a part."""
    axis = next((axis for axis, where in enumerate(part.index) if isinstance(where, slice)), len(part.index))
    whole = part.index[axis] if axis < len(part.index) else slice(0, part.shape[0])
    assert isinstance(whole, slice) and axis >= len(part.index) - 1, part
    index = (*part.index[:axis], slice(whole.start + start, whole.start + stop))
    return replace(part, shape=(stop - start, *part.shape[1:]), index=index)


def overlap(
    part: HFTensor, row: TensorMapping, offset: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[int | slice, ...]] | None:
    """Where `part` and a rectangle of its whole tensor meet, or None if they do not.

    The first index is into the part, which is without a stack's axis, the second into the rectangle.
    """
    part_index: list[slice] = []
    rectangle_index: list[int | slice] = []
    for axis, (low, size, begin, extent) in enumerate(zip(*offset_and_sizes(part, row), offset, sizes, strict=True)):
        start, stop = max(low, begin), min(low + size, begin + extent)
        if start >= stop:
            return None
        if axis < len(part.index) and isinstance(part.index[axis], int):
            rectangle_index.append(start - begin)
        else:
            rectangle_index.append(slice(start - begin, stop - begin))
            part_index.append(slice(start - low, stop - low))
    return tuple(part_index), tuple(rectangle_index)
