"""Triton where there is one: a CPU build of torch comes without, and only the torch twins run there."""

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
        """Leave a kernel as it is: nothing launches it."""
        return function


__all__ = ["jit", "tl", "triton"]
