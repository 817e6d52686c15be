"""The two plain layers that Megatron-Core only has through Transformer Engine."""

from typing import Any

import torch
import torch.nn.functional as F


class ReplicatedLinear(torch.nn.Module):
    """A linear layer held whole by every tensor-parallel rank, applied to that rank's slice of the sequence.

    Input [sequence / TP, batch, in], output [sequence / TP, batch, out]. Its weight gradient is summed over the
    tensor-parallel ranks by Megatron's `finalize_model_grads`, which looks for the `sequence_parallel` mark.
    """

    def __init__(self, input_size: int, output_size: int, *, config: Any, bias: bool, **_: Any) -> None:
        super().__init__()
        assert not bias, "the family has no biases"
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        return F.linear(hidden, self.weight), None


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, with the sequence-parallel mark on its gain.

    Takes any dtype, computes in float32 and returns its gain's dtype, so that a float32 residual stream can feed it.
    Megatron's own torch norm refuses sequence parallelism.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.empty(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(hidden.float(), (hidden.shape[-1],), self.weight.float(), self.eps)
        return normed.to(self.weight.dtype)


class LatentRMSNorm(RMSNorm):
    """The norm between the down- and up-projections of latent attention.

    DeepSeek's modelling code, and transformers after it, give this norm epsilon 1e-6 whatever `rms_norm_eps` says.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__(config, hidden_size, 1e-6)
