"""Slow, obvious twins: one matrix at a time, in float64, as the papers write it."""

import math

import numpy as np
import torch

from moonlight.optim.newton_schulz import COEFFICIENTS


def slow_newton_schulz(matrix: np.ndarray, steps: int, name: str) -> np.ndarray:
    """X0 = M / ||M||_F, then X <- a X + b (X X^T) X + c (X X^T)^2 X."""
    first, then = COEFFICIENTS[name]
    x = matrix.astype(np.float64)
    if x.shape[0] > x.shape[1]:
        return slow_newton_schulz(matrix.T, steps, name).T
    x = x / (np.linalg.norm(x) + 1e-7)
    for step in range(steps):
        a, b, c = first[step] if step < len(first) else then
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


class SlowMuon:
    """Muon on one matrix: M = mu M + G, W <- W - lr (0.2 sqrt(max(rows, columns)) O + wd W)."""

    def __init__(self, weight: np.ndarray, *, nesterov: bool = True, steps: int = 5, name: str = "moonlight") -> None:
        self.weight = weight.astype(np.float64)
        self.momentum = np.zeros_like(self.weight)
        self.nesterov, self.steps, self.name = nesterov, steps, name

    def step(self, gradient: np.ndarray, learning_rate: float, decay: float = 0.1, mu: float = 0.95) -> None:
        self.momentum = mu * self.momentum + gradient
        direction = gradient + mu * self.momentum if self.nesterov else self.momentum
        update = 0.2 * math.sqrt(max(direction.shape)) * slow_newton_schulz(direction, self.steps, self.name)
        self.weight = self.weight - learning_rate * (update + decay * self.weight)


def plain_loop(matrix: torch.Tensor, steps: int, name: str, dtype: torch.dtype) -> torch.Tensor:
    """The iteration on one matrix in `dtype`, as other optimizers run it."""
    first, then = COEFFICIENTS[name]
    if matrix.shape[0] > matrix.shape[1]:
        return plain_loop(matrix.T, steps, name, dtype).T
    x = (matrix / (matrix.norm() + 1e-7)).to(dtype)
    for step in range(steps):
        a, b, c = first[step] if step < len(first) else then
        gram = x @ x.T
        mixed = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, mixed, x, beta=a)
    return x


def spectrum(kind: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A float32 matrix with Gaussian elements, or singular values 1/i, or log-uniform over four decades."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "gauss":
        return torch.randn(rows, columns, generator=generator)
    count = min(rows, columns)
    left, _ = torch.linalg.qr(torch.randn(rows, count, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(columns, count, generator=generator))
    decades = 10 ** (-4 * torch.rand(count, generator=generator))
    values = 1 / torch.arange(1, count + 1) if kind == "power law" else decades
    return (left * values) @ right.T
