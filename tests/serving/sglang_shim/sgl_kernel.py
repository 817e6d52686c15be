"""Stand-in for SGLang's package of compiled kernels, which has no build for CPU on PyPI.

On a CPU SGLang imports a handful of names from it and calls one of them for this model. The others may be imported; a
call is an error, not a guess.
"""

import torch


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    _pool_width: int,
) -> None:
    """Note in each request's row of the table which cache slots its new tokens got; slots come one after the other."""
    used = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        req_to_token[row, start:end] = out_cache_loc[used : used + end - start].to(req_to_token.dtype)
        used += end - start


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_args, **_kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} is a compiled kernel that this shim does not replace")

    return missing
