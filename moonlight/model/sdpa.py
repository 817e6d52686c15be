"""Which of torch's attention kernels takes these shapes on this device, and takes them forward and backward."""

import time
import warnings
from functools import lru_cache

import moonlight.cpu  # noqa: F401  (stand-ins: a CPU has nothing to synchronize)

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


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """softmax(q k^T * scale) v under `mask` bool [batch, 1, sequence, sequence], or a causal one if that is None.

    `query` and `key` [batch, heads, sequence, dim], `value` and the result [batch, heads, sequence, v_head_dim].
    """
    widths = query.shape[-1], value.shape[-1]
    kernel = kernel_for(query.device, query.dtype, tuple(query.shape[:3]), widths, mask is not None)
    return _run(kernel, query, key, value, mask, scale)


def choices() -> list[str]:
    """What was chosen since the last call, in words, with its measured time."""
    found, _choices[:] = _choices[:], []
    return found


@lru_cache
def kernel_for(
    device: torch.device, dtype: torch.dtype, size: tuple[int, ...], widths: tuple[int, int], has_mask: bool
) -> SDPBackend:
    """The first kernel by preference that takes it. `size`: batch, heads, sequence; `widths`: of keys and of values."""
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch gives the reasons of each refusal
        inputs = [
            torch.randn(*size, width, device=device, dtype=dtype, requires_grad=True)
            for width in (*widths[:1], *widths)
        ]
        mask = torch.ones(size[0], 1, size[2], size[2], dtype=torch.bool, device=device).tril() if has_mask else None
        for kernel in BY_PREFERENCE:
            try:
                _seconds(kernel, inputs, mask)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError) or kernel is BY_PREFERENCE[-1]:
                    raise
                continue
            milliseconds = 1e3 * _seconds(kernel, inputs, mask)
            break
    shape = f"keys of {widths[0]} and values of {widths[1]}, {size[0]} x {size[1]} heads x {size[2]} tokens"
    name = kernel.name.lower().removesuffix("_attention")
    _choices.append(f"attention by {name} for {shape}: {milliseconds:.2f} ms forward and backward")
    return kernel


def _run(
    kernel: SDPBackend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)


def _seconds(kernel: SDPBackend, inputs: list[torch.Tensor], mask: torch.Tensor | None) -> float:
    """Of a forward and a backward pass."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    out = _run(kernel, inputs[0], inputs[1], inputs[2], mask, None)
    torch.autograd.grad(out, inputs, torch.ones_like(out))
    torch.cuda.synchronize()
    return time.perf_counter() - started
