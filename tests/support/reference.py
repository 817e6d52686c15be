"""Slow, obvious references: one matrix at a time, in float64, as written in the papers."""

import math

import numpy as np

from moonlight.optim.newton_schulz import COEFFICIENTS


def slow_newton_schulz(matrix: np.ndarray, steps: int, name: str) -> np.ndarray:
    """Iterate X0 = M / ||M||_F, then X <- a X + b (X X^T) X + c (X X^T)^2 X."""
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


def slow_scale(orthogonal: np.ndarray, matching: str = "adjusted_lr", hidden_size: int = 0) -> np.ndarray:
    """Scale an orthogonal matrix: to RMS 0.2 by its shape or by its measured RMS, or by one factor for all shapes."""
    if matching == "update_norm":
        rms = math.sqrt(np.mean(orthogonal**2))
        return 0.2 * orthogonal / rms if rms else orthogonal
    return 0.2 * math.sqrt(hidden_size if matching == "baseline" else max(orthogonal.shape)) * orthogonal


class SlowMuon:
    """Muon on one matrix: M = mu M + G, W <- W - lr (0.2 sqrt(max(rows, columns)) O + wd W)."""

    def __init__(
        self,
        weight: np.ndarray,
        *,
        nesterov: bool = True,
        steps: int = 5,
        name: str = "moonlight",
        matching: str = "adjusted_lr",
        hidden_size: int = 0,
    ) -> None:
        self.weight = weight.astype(np.float64)
        self.momentum = np.zeros_like(self.weight)
        self.nesterov, self.steps, self.name = nesterov, steps, name
        self.matching, self.hidden_size = matching, hidden_size

    def step(self, grad: np.ndarray, learning_rate: float, decay: float = 0.1, mu: float = 0.95) -> None:
        self.momentum = mu * self.momentum + grad
        direction = grad + mu * self.momentum if self.nesterov else self.momentum
        update = slow_scale(slow_newton_schulz(direction, self.steps, self.name), self.matching, self.hidden_size)
        self.weight = self.weight - learning_rate * (update + decay * self.weight)
