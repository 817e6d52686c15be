"""Feed-forward blocks of a layer: dense, and shared and routed experts."""

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from moonlight.kernels.permute import sort_by_expert
from moonlight.kernels.swiglu import swiglu, swiglu_backward
from moonlight.model.recompute import recompute_in_backward


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, where gate and up are the halves of the last dimension. Saves only its input."""

    @staticmethod
    def forward(ctx: Any, halves: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(halves)
        return swiglu(*halves.flatten(0, -2).chunk(2, dim=-1)).view(*halves.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (halves,) = ctx.saved_tensors
        grad_halves = torch.empty_like(halves)
        gate, up = halves.flatten(0, -2).chunk(2, dim=-1)
        grad_gate, grad_up = grad_halves.flatten(0, -2).chunk(2, dim=-1)
        swiglu_backward(grad.flatten(0, -2), gate, up, None, (grad_gate, grad_up))
        return grad_halves


def _forward(mlp: MLP, hidden: torch.Tensor) -> torch.Tensor:
    halves, _ = mlp.linear_fc1(hidden)
    inner = SwiGLU.apply(halves)
    out, _ = mlp.linear_fc2(inner)
    if "mlp_act" in mlp.config.recompute_modules:
        recompute_in_backward([inner], lambda: [SwiGLU.apply(halves)], out)
    return out


class DenseMLP(MLP):
    """Megatron's MLP with SwiGLU as one autograd function."""

    def forward(self, hidden: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """Return the output for `hidden`, both [sequence / TP, batch, hidden], and no bias."""
        return _forward(self, hidden), None


class SharedExperts(SharedExpertMLP):
    """Shared experts, which process every token, as one MLP."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output for `hidden`, both [sequence / TP, batch, hidden]."""
        return _forward(self, hidden)


class MoEBlock(MoELayer):
    """Shared and routed experts.

    If this rank holds every expert in full, it sorts the tokens once and exchanges none, and the host does not
    synchronize with the device. (Torch's grouped GEMM synchronizes, except in bfloat16 on Hopper and Blackwell.) With
    expert or expert tensor parallelism, Megatron's dispatcher exchanges the tokens, and the host waits for their
    counts.
    """

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """Return the output for `hidden`, both [sequence / TP, batch, hidden], and no bias."""
        if self.experts.ep_group.size() * self.experts.tp_group.size() > 1:
            return super().forward(hidden)
        probabilities, chosen = self.router(hidden)
        order = sort_by_expert(chosen, self.num_local_experts)
        routed = self.experts(hidden.flatten(0, 1), probabilities, chosen, order)
        return routed.view_as(hidden) + self.shared_experts(hidden), None

    def route(self, hidden: torch.Tensor, padding_mask: None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return probabilities and mask for Megatron's dispatchers: [tokens, experts], 0 or false if not chosen."""
        probabilities, chosen = self.router(hidden)
        zeros = probabilities.new_zeros(len(chosen), self.config.num_moe_experts)
        return zeros.scatter(1, chosen, probabilities), zeros.bool().scatter_(1, chosen, True)

    def routed_experts_compute(self, hidden: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Apply this rank's experts to the tokens that the dispatcher received, which are sorted by expert."""
        tokens, counts, probs = self.token_dispatcher.dispatch_postprocess(hidden, probs)
        counts = counts.to(tokens.device, non_blocking=True)  # Megatron counts in page-locked host memory
        experts = torch.arange(len(counts), device=tokens.device)
        chosen = experts.repeat_interleave(counts, output_size=len(tokens)).unsqueeze(1)
        positions = torch.arange(len(tokens), device=tokens.device)
        order = positions, positions.unsqueeze(1), counts.cumsum(0).to(torch.int32)
        out = self.experts(tokens, probs.unsqueeze(1), chosen, order)
        return self.token_dispatcher.combine_preprocess(out), None
