"""The feed-forward parts of a layer: dense, and the mixture of shared and routed experts."""

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from moonlight.kernels.permute import sort_by_expert
from moonlight.kernels.swiglu import swiglu, swiglu_backward
from moonlight.model.recompute import recompute_in_backward


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of both halves of the last dimension, of which only they are kept."""

    @staticmethod
    def forward(ctx: Any, halves: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(halves)
        return swiglu(*halves.flatten(0, -2).chunk(2, dim=-1)).view(*halves.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (halves,) = ctx.saved_tensors
        grad_halves = torch.empty_like(halves)
        gate, up = halves.flatten(0, -2).chunk(2, dim=-1)
        to_gate, to_up = grad_halves.flatten(0, -2).chunk(2, dim=-1)
        swiglu_backward(grad.flatten(0, -2), gate, up, None, (to_gate, to_up))
        return grad_halves


def _pass(mlp: MLP, hidden: torch.Tensor) -> torch.Tensor:
    halves, _ = mlp.linear_fc1(hidden)
    inner = SwiGLU.apply(halves)
    out, _ = mlp.linear_fc2(inner)
    if "mlp_act" in mlp.config.recompute_modules:
        recompute_in_backward([inner], lambda: [SwiGLU.apply(halves)], out)
    return out


class DenseMLP(MLP):
    """Megatron's, with its activation as one operation."""

    def forward(self, hidden: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """[sequence / TP, batch, hidden] to the same."""
        return _pass(self, hidden), None


class SharedExperts(SharedExpertMLP):
    """Experts that see every token, as one MLP."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[sequence / TP, batch, hidden] to the same."""
        return _pass(self, hidden)


class MoEBlock(MoELayer):
    """Shared and routed experts.

    Where every expert is on this rank, tokens are sorted once and never leave, and the host asks for no number of the
    device (torch's grouped product does by itself but in bfloat16 on Hopper and Blackwell); with expert parallelism
    Megatron's dispatcher exchanges them, and waits for their counts.
    """

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """[sequence / TP, batch, hidden] to the same."""
        if self.experts.ep_group.size() * self.experts.tp_group.size() > 1:
            return super().forward(hidden)
        probabilities, chosen = self.router(hidden)
        order = sort_by_expert(chosen, self.num_local_experts)
        routed = self.experts(hidden.flatten(0, 1), probabilities, chosen, order)
        return routed.view_as(hidden) + self.shared_experts(hidden), None

    def route(self, hidden: torch.Tensor, padding_mask: None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """As Megatron's dispatchers want it: [tokens, experts], zero or false where not chosen."""
        probabilities, chosen = self.router(hidden)
        zeros = probabilities.new_zeros(len(chosen), self.config.num_moe_experts)
        return zeros.scatter(1, chosen, probabilities), zeros.bool().scatter_(1, chosen, True)

    def routed_experts_compute(self, hidden: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The experts of this rank on what the dispatcher has brought, which it has sorted."""
        tokens, counts, probs = self.token_dispatcher.dispatch_postprocess(hidden, probs)
        counts = counts.to(tokens.device, non_blocking=True)  # Megatron counts in page-locked host memory
        every = torch.arange(len(counts), device=tokens.device)
        chosen = every.repeat_interleave(counts, output_size=len(tokens)).unsqueeze(1)
        places = torch.arange(len(tokens), device=tokens.device)
        order = places, places.unsqueeze(1), counts.cumsum(0).to(torch.int32)
        out = self.experts(tokens, probs.unsqueeze(1), chosen, order)
        return self.token_dispatcher.combine_preprocess(out), None
