"""Which of torch's attention kernels takes these shapes on this device, and takes them forward and backward."""

import time
import warnings
from functools import lru_cache

import moonlight.megatron_compat  # noqa: F401  (stand-ins: a CPU has nothing to synchronize)

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BY_PREFERENCE = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
"""The order does not depend on how fast they are at the moment, because a run that goes on must give the same bits.
Torch by itself prefers flash attention, which wants keys and values of one width."""

_choices: list[str] = []

MemoryLayout = tuple[torch.Size, tuple[int, ...], int]
"""Shape, strides and offset of a tensor in its memory."""


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q k^T * scale) v under a causal mask, and within documents where they are given.

    `query` and `key` [sequence, batch, heads, dim], `value` [sequence, batch, heads, v_head_dim], of one dtype and any
    strides; `documents` int [batch, sequence]. The result is [sequence, batch, heads * v_head_dim].
    """
    kernel = select_backend(
        query.device,
        query.dtype,
        (memory_layout(query), memory_layout(key), memory_layout(value)),
        documents is not None,
    )
    mask = None if documents is None else _kept_mask(documents, query.dtype)
    return _run(kernel, query, key, value, mask, scale)


def memory_layout(tensor: torch.Tensor) -> MemoryLayout:
    """What `select_backend` asks of a tensor."""
    return tensor.shape, tensor.stride(), int(tensor.storage_offset())


def _mask(documents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to logits, so that a token sees its document up to itself: [batch, 1, sequence, sequence].

    A boolean mask would become this in every layer anew, and every layer's would be kept for the backward pass. It is
    finite because cuDNN has been wrong with -inf, and half of the least number because kernels multiply it by log2(e).
    """
    hidden = (documents[:, None, :, None] == documents[:, None, None, :]).tril_().logical_not_()
    mask = torch.zeros(hidden.shape, dtype=dtype, device=documents.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min / 2)


_kept_mask = lru_cache(maxsize=1)(_mask)
"""All layers of a pass ask for the same mask, and get one tensor."""


def pop_selections() -> list[str]:
    """What was chosen since the last call, in words, with its measured time."""
    found, _choices[:] = _choices[:], []
    return found


@lru_cache
def select_backend(
    device: torch.device, dtype: torch.dtype, places: tuple[MemoryLayout, MemoryLayout, MemoryLayout], has_mask: bool
) -> SDPBackend:
    """The first kernel by preference that takes queries, keys and values of these shapes and strides, as `attention`
    does. The global random numbers stay as they are."""
    length, batch, heads, key_width = places[0][0]
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch gives the reasons of each refusal
        generator = torch.Generator(device).manual_seed(0)
        inputs = [_drawn(each, dtype, generator) for each in places]
        mask = _mask(torch.zeros(batch, length, device=device), dtype) if has_mask else None
        for kernel in BY_PREFERENCE:
            try:
                _seconds(kernel, inputs, mask)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError) or kernel is BY_PREFERENCE[-1]:
                    raise
                continue
            milliseconds = 1e3 * _seconds(kernel, inputs, mask)
            break
    shape = f"keys of {key_width} and values of {places[2][0][-1]}, {batch} x {heads} heads x {length} tokens"
    name = kernel.name.lower().removesuffix("_attention")
    _choices.append(f"attention by {name} for {shape}: {milliseconds:.2f} ms forward and backward")
    return kernel


def _drawn(place: MemoryLayout, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    shape, strides, offset = place
    elements = 1 + offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = torch.randn(elements, dtype=dtype, device=generator.device, generator=generator)
    return memory.as_strided(shape, strides, offset).requires_grad_()


def _run(
    kernel: SDPBackend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [batch, heads, sequence, dim]
    with sdpa_kernel(kernel):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out.permute(2, 0, 1, 3).flatten(2)


def _seconds(kernel: SDPBackend, inputs: list[torch.Tensor], mask: torch.Tensor | None) -> float:
    """Of a forward and a backward pass."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    out = _run(kernel, inputs[0], inputs[1], inputs[2], mask, None)
    torch.autograd.grad(out, inputs, out.new_ones(out.shape))  # contiguous, as the next layer's gradient is
    torch.cuda.synchronize()
    return time.perf_counter() - started
