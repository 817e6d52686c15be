"""Replicated linear layer and RMS norm, which Megatron-Core provides only through Transformer Engine."""

from typing import Any

import torch
import torch.nn.functional as F

from moonlight.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward


def new_parameter(config: Any, *shape: int) -> torch.nn.Parameter:
    """Return an uninitialized parameter of `config.params_dtype` on the current device."""
    return torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device()))


class ReplicatedLinear(torch.nn.Module):
    """A linear layer that every tensor-parallel rank holds in full and applies to its slice of the sequence.

    Input [sequence / TP, batch, in], output [sequence / TP, batch, out].
    """

    def __init__(self, input_size: int, output_size: int, *, config: Any, bias: bool, **_: Any) -> None:
        super().__init__()
        assert not bias, "the models of this family have no biases"
        self.weight = new_parameter(config, output_size, input_size)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        return F.linear(hidden, self.weight), None


class _AddRMSNorm(torch.autograd.Function):
    """residual + update and, as in `_RMSNorm`, the norm of the sum."""

    @staticmethod
    def forward(ctx: Any, residual: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        total, normed, reciprocal = add_rms_norm(residual, update, weight, eps)
        ctx.save_for_backward(total, weight, reciprocal)
        ctx.update_dtype = update.dtype
        return total, normed

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor, grad_normed: torch.Tensor) -> Any:
        total, weight, reciprocal = ctx.saved_tensors
        grad, grad_weight = rms_norm_backward(grad_normed, total, weight, reciprocal, grad_total)
        return grad, grad.to(ctx.update_dtype), grad_weight, None


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight over the last dimension. Saves x, the weight and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normed, reciprocal = rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, reciprocal)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return *rms_norm_backward(grad, *ctx.saved_tensors), None


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension.

    Takes any dtype, computes in float32 and returns the dtype of its weight, so a float32 residual stream can feed it.
    Megatron's torch norm does not support sequence parallelism.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = new_parameter(config, hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = _RMSNorm.apply(hidden, self.weight, self.eps)
        return result

    def add(self, residual: torch.Tensor, update: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return residual + update, in the dtype of the residual, and the norm of the sum."""
        total, normed = _AddRMSNorm.apply(residual, update, self.weight, self.eps)
        return total, normed


class LatentRMSNorm(RMSNorm):
    """The norm between the down- and up-projections of latent attention.

    Its epsilon is always 1e-6, as in DeepSeek's modeling code and in transformers, for any value of `rms_norm_eps`.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__(config, hidden_size, 1e-6)
