"""Triton if it is installed. CPU builds of torch come without it, and then only the torch references run."""

from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
except ModuleNotFoundError:
    if torch.version.cuda is not None:
        raise

    triton = tl = None

    def jit(function: Any) -> Any:
        """Return a kernel unchanged: without Triton, nothing launches it."""
        return function


__all__ = ["jit", "tl", "triton"]
