"""Rotary position embedding of latent attention (Su et al., arXiv 2104.09864, equation 34).

Entries 2i and 2i + 1 of a head are one pair, rotated by one angle. The result has the first entries of all pairs, then
all second entries, like transformers' DeepSeek-V3 (`rope_interleave`) and Megatron-Core's latent attention. Queries and
keys have the same order, so it does not change their products.
"""

from __future__ import annotations  # kernels use `tl.constexpr`, which does not exist without Triton

import torch
from torch import Tensor

from moonlight.kernels.blocks import dense_rows, new_like, row_blocks
from moonlight.kernels.jit import jit, tl, triton

TILE_HEADS, NUM_WARPS = 32, 4
"""Heads per program, of one or several tokens."""


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, out: Tensor | None = None) -> Tensor:
    """Return `x` with rotated pairs, in its shape and dtype.

    Args:
        x: [sequence, batch, heads, dim], possibly part of wider heads.
        cosine, sine: float32 [sequence, 1 or batch, 1, dim] of the angles of the dim / 2 pairs, twice; only the first
            half is read.
        out: tensor for the result, possibly part of wider heads; it must not share memory with `x`. Default: a new one.
    """
    return (rotate_triton if x.is_cuda else rotate_torch)(x, cosine, sine, out)


def rotate_backward(grad: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return the gradient of `rotate`'s input: rotate by the negative angle, back to the order of pairs."""
    return (rotate_backward_triton if grad.is_cuda else rotate_backward_torch)(grad, cosine, sine)


def _pairs(x: Tensor) -> int:
    """Return the number of pairs of a head."""
    assert x.shape[-1] % 2 == 0, f"dim is {x.shape[-1]}: it must be even"
    return x.shape[-1] // 2


def rotate_torch(x: Tensor, cosine: Tensor, sine: Tensor, out: Tensor | None = None) -> Tensor:
    """Reference of `rotate_triton`, with a pair as a complex number."""
    result = new_like(x) if out is None else out
    half = _pairs(x)
    for rows in row_blocks(len(x), x[:1].numel()):
        angles = torch.complex(cosine[rows, ..., :half], sine[rows, ..., :half])
        rotated = torch.view_as_real(_complex(x[rows].float()) * angles)
        result[rows].unflatten(-1, (2, half)).copy_(rotated.mT)
    return result


def _complex(x: Tensor) -> Tensor:
    """Return [..., dim] as complex [..., dim / 2]; a copy if torch does not allow a view."""
    if x.stride(-1) != 1 or any(n % 2 for n in (x.storage_offset(), *x.stride()[:-1])):
        x = x.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def rotate_backward_torch(grad: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Reference of `rotate_backward_triton`."""
    result = new_like(grad)
    half = _pairs(grad)
    for rows in row_blocks(len(grad), grad[:1].numel()):
        angles = torch.complex(cosine[rows, ..., :half], sine[rows, ..., :half].neg())
        pairs = result[rows].unflatten(-1, (half, 2))
        rotated = pairs if grad.dtype == torch.float32 else torch.empty(pairs.shape, device=grad.device)
        rotated.copy_(grad[rows].unflatten(-1, (2, half)).mT)
        torch.view_as_complex(rotated).mul_(angles)
        if rotated is not pairs:
            pairs.copy_(rotated)
    return result


def rotate_triton(x: Tensor, cosine: Tensor, sine: Tensor, out: Tensor | None = None) -> Tensor:
    """Make one pass: read x, write the result."""
    return _launch(x, cosine, sine, new_like(x) if out is None else out, backward=False)


def rotate_backward_triton(grad: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Make one pass: read the gradient, write the result."""
    return _launch(grad, cosine, sine, new_like(grad), backward=True)


def _launch(x: Tensor, cosine: Tensor, sine: Tensor, out: Tensor, *, backward: bool) -> Tensor:
    assert out.stride(-1) == 1, "the entries of `out` are not contiguous"
    x, cosine, sine = (dense_rows(tensor) for tensor in (x, cosine, sine))
    length, batch, heads, _ = x.shape
    half = _pairs(x)
    tile_heads = min(TILE_HEADS, triton.next_power_of_2(heads))
    tile_tokens = TILE_HEADS // tile_heads
    # With a stride of 0, every sequence of the batch has the same angles.
    strides = [angles.stride()[:2] if angles.shape[1] > 1 else (angles.stride(0), 0) for angles in (cosine, sine)]
    with torch.cuda.device_of(x):
        _rotate[(triton.cdiv(length * batch, tile_tokens), triton.cdiv(heads, tile_heads))](
            x, cosine, sine, out, length * batch, batch, heads, half,
            *x.stride()[:3], *strides[0], *strides[1], *out.stride()[:3],
            backward, tile_tokens, tile_heads, triton.next_power_of_2(half), num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


@jit
def _rotate(
    x, cosine, sine, out, tokens, batch, heads, half,
    x_sequence_stride, x_batch_stride, x_head_stride,
    cosine_sequence_stride, cosine_batch_stride, sine_sequence_stride, sine_batch_stride,
    out_sequence_stride, out_batch_stride, out_head_stride,
    BACKWARD: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    position, sequence = token // batch, token % batch
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[None, :, None]
    pair = tl.arange(0, HALF)[None, None, :]
    entry = tl.arange(0, 2 * HALF)[None, None, :]
    angle_mask = (token < tokens) & (pair < half)
    head_mask = (token < tokens) & (head < heads)
    cos = tl.load(cosine + position * cosine_sequence_stride + sequence * cosine_batch_stride + pair, angle_mask, 0.0)
    sin = tl.load(sine + position * sine_sequence_stride + sequence * sine_batch_stride + pair, angle_mask, 0.0)
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    x += position * x_sequence_stride + sequence * x_batch_stride + head * x_head_stride
    out += position * out_sequence_stride + sequence * out_batch_stride + head * out_head_stride
    in_pairs, in_halves = head_mask & (entry < 2 * half), head_mask & (pair < half)
    if BACKWARD:
        first = tl.load(x + pair, in_halves, 0.0).to(tl.float32)
        second = tl.load(x + half + pair, in_halves, 0.0).to(tl.float32)
        result = tl.interleave(first * cos + second * sin, second * cos - first * sin)
        tl.store(out + entry, result, in_pairs)
    else:
        pairs = tl.load(x + entry, in_pairs, 0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(pairs, [TOKENS, HEADS, HALF, 2]))
        tl.store(out + pair, first * cos - second * sin, in_halves)
        tl.store(out + half + pair, second * cos + first * sin, in_halves)
