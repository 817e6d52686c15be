"""Torch's scaled dot-product attention, with the preferred backend that supports the shapes forward and backward."""

import time
import warnings
from functools import lru_cache

import moonlight.megatron_compat  # noqa: F401  (stand-ins: a CPU has nothing to synchronize)

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

PREFERRED_BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
"""Most preferred first. The order is fixed, not measured, because a resumed run must be bit-identical. Torch's default
order prefers flash attention, which requires keys and values of equal width."""

_selections: list[str] = []

MemoryLayout = tuple[torch.Size, tuple[int, ...], int]
"""Shape, strides and storage offset of a tensor."""


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, document_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Return softmax(q k^T * scale) v under a causal mask: [sequence, batch, heads * v_head_dim].

    `query` and `key` are [sequence, batch, heads, dim], `value` is [sequence, batch, heads, v_head_dim], of one dtype
    and any strides. With `document_ids`, int [batch, sequence], attention stays within each document.
    """
    backend = select_backend(
        query.device,
        query.dtype,
        (memory_layout(query), memory_layout(key), memory_layout(value)),
        document_ids is not None,
    )
    mask = None if document_ids is None else _cached_mask(document_ids, query.dtype)
    return _run(backend, query, key, value, mask, scale)


def memory_layout(tensor: torch.Tensor) -> MemoryLayout:
    """Return the memory layout of a tensor, the input of `select_backend`."""
    return tensor.shape, tensor.stride(), int(tensor.storage_offset())


def _mask(document_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the additive causal mask within documents: [batch, 1, sequence, sequence], 0 where attention is allowed.

    Torch would convert a boolean mask to this form in each layer, and save each layer's copy for the backward pass.
    Masked entries are finite because cuDNN has returned wrong results with -inf. They are half of the dtype's minimum
    because kernels multiply them by log2(e).
    """
    masked = (document_ids[:, None, :, None] == document_ids[:, None, None, :]).tril_().logical_not_()
    mask = torch.zeros(masked.shape, dtype=dtype, device=document_ids.device)
    return mask.masked_fill_(masked, torch.finfo(dtype).min / 2)


_cached_mask = lru_cache(maxsize=1)(_mask)
"""`_mask`, computed once for all layers of a pass."""


def pop_selections() -> list[str]:
    """Return a log line for each backend selected since the last call, with its measured time."""
    selections, _selections[:] = _selections[:], []
    return selections


@lru_cache
def select_backend(
    device: torch.device, dtype: torch.dtype, layouts: tuple[MemoryLayout, MemoryLayout, MemoryLayout], has_mask: bool
) -> SDPBackend:
    """Return the first of `PREFERRED_BACKENDS` that runs `attention` forward and backward.

    Runs each backend on random inputs until one succeeds. Does not change the global random state. Cached.

    Args:
        layouts: memory layouts of queries, keys and values, as passed to `attention`.
        has_mask: whether attention stays within documents.

    Raises:
        torch.OutOfMemoryError: the inputs do not fit in memory.
        RuntimeError: no backend supports them.
    """
    length, batch, heads, key_width = layouts[0][0]
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about each unsupported backend
        generator = torch.Generator(device).manual_seed(0)
        inputs = [_random_tensor(layout, dtype, generator) for layout in layouts]
        mask = _mask(torch.zeros(batch, length, device=device), dtype) if has_mask else None
        for backend in PREFERRED_BACKENDS:
            try:
                _seconds(backend, inputs, mask)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError) or backend is PREFERRED_BACKENDS[-1]:
                    raise
                continue
            milliseconds = 1e3 * _seconds(backend, inputs, mask)
            break
    shape = f"keys of {key_width} and values of {layouts[2][0][-1]}, {batch} x {heads} heads x {length} tokens"
    name = backend.name.lower().removesuffix("_attention")
    _selections.append(f"attention backend {name} for {shape}: {milliseconds:.2f} ms forward and backward")
    return backend


def _random_tensor(layout: MemoryLayout, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    shape, strides, offset = layout
    elements = 1 + offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = torch.randn(elements, dtype=dtype, device=generator.device, generator=generator)
    return memory.as_strided(shape, strides, offset).requires_grad_()


def _run(
    backend: SDPBackend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [batch, heads, sequence, dim]
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out.permute(2, 0, 1, 3).flatten(2)


def _seconds(backend: SDPBackend, inputs: list[torch.Tensor], mask: torch.Tensor | None) -> float:
    """Return the wall time of a forward and backward pass, in seconds."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    out = _run(backend, inputs[0], inputs[1], inputs[2], mask, None)
    torch.autograd.grad(out, inputs, out.new_ones(out.shape))  # contiguous, as the next layer's gradient is
    torch.cuda.synchronize()
    return time.perf_counter() - started
