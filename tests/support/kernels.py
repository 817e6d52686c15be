"""Device and tolerances of the tests of kernels, and references for them."""

import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Kernels are compiled on a GPU, and run in Triton's interpreter on a CPU (conftest.py)."""
DTYPES = (torch.float32, torch.bfloat16)
needs_triton = pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux only")
"""The `pytestmark` of every file that launches kernels. On Linux, they fail without Triton."""


def random(*shape, seed=0, dtype=torch.float32, scale=1.0, device=DEVICE):
    """Return normal numbers that are the same on every device."""
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(device, dtype)


def assert_near(result, expected, function, size=None):
    """Compare the result of `function` with float64.

    A bfloat16 result is rounded once, to half of 2^-8 of its size; Triton's interpreter truncates instead of rounding.
    Float32 arithmetic leaves an error of a few units of 2^-24 of `size`. For a sum, `size` is the sum of the absolute
    terms, if that exceeds the result.
    """
    assert result.shape == expected.shape
    rounding = 0.0
    if result.dtype == torch.bfloat16:
        rounding = 2**-7 if "_triton" in function.__name__ and not torch.cuda.is_available() else 2**-8
    size = expected.abs() if size is None else torch.maximum(size, expected.abs())
    error = (result.double() - expected).abs()
    assert (error <= rounding * expected.abs() + 3e-6 * size + 1e-7).all(), (function.__name__, error.max())


def torch_symmetric_product(
    left: torch.Tensor,
    right: torch.Tensor,
    out: torch.Tensor,
    *,
    alpha: float = 1,
    added: torch.Tensor | None = None,
    beta: float = 0,
    gamma: float = 0,
) -> None:
    """Reference of `symmetric_product`: float32, rounded once, with the upper triangle mirrored."""
    result = alpha * (left.float() @ right.float())
    if added is not None:
        result += beta * added.float()
    result.diagonal(dim1=-2, dim2=-1).add_(gamma)
    out.copy_(result.triu() + result.triu(1).mT)
