"""Routed experts: one [experts, in, out] tensor per projection, multiplied by torch's grouped GEMM."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor

from moonlight.kernels.chunk_sizes import EXPERT_ROW_ALIGNMENT
from moonlight.kernels.permute import ExpertPermutation, pad_expert_segments, permute_tokens, unpermute_tokens
from moonlight.kernels.swiglu import swiglu, swiglu_backward
from moonlight.model.linear import new_parameter


class SortedExperts(torch.autograd.Function):
    """SwiGLU experts: the sum over each token's k experts, weighted by its probabilities.

    Shapes: `tokens` and the result [tokens, hidden]; `probabilities` float32 [tokens, k]; gate_proj and up_proj
    [E, hidden, M], down_proj [E, M, hidden]. `source`, `inverse` and `ends` are the permutation that
    `pad_expert_segments` returns; its gaps get probability 0.

    The forward pass saves the inputs and the gate and up projections. The backward pass gathers the tokens again and
    recomputes the activation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: torch.Tensor,
        probabilities: torch.Tensor,
        down_proj: torch.Tensor,
        gate_proj: torch.Tensor,
        up_proj: torch.Tensor,
        source: torch.Tensor,
        inverse: torch.Tensor,
        ends: torch.Tensor,
    ) -> torch.Tensor:
        rows = permute_tokens(tokens, source)
        gate, up = (F.grouped_mm(rows, weight, offs=ends) for weight in (gate_proj, up_proj))
        inner = swiglu(gate, up, _sort_probabilities(probabilities, source, inverse))
        out = unpermute_tokens(F.grouped_mm(inner, down_proj, offs=ends), inverse)
        ctx.save_for_backward(tokens, probabilities, gate_proj, up_proj, down_proj, source, inverse, ends, gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        tokens, probabilities, gate_proj, up_proj, down_proj, source, inverse, ends, gate, up = ctx.saved_tensors
        grad = permute_tokens(grad, source)
        grad_inner = F.grouped_mm(grad, down_proj.mT, offs=ends)
        grad_gate, grad_up, grad_probabilities, inner = swiglu_backward(
            grad_inner, gate, up, _sort_probabilities(probabilities, source, inverse)
        )
        assert grad_probabilities is not None
        grad_down = F.grouped_mm(inner.mT, grad, offs=ends)
        rows = permute_tokens(tokens, source)
        grad_weights = [F.grouped_mm(rows.mT, grad_output, offs=ends) for grad_output in (grad_gate, grad_up)]
        grad_rows = F.grouped_mm(grad_gate, gate_proj.mT, offs=ends)
        grad_rows += F.grouped_mm(grad_up, up_proj.mT, offs=ends)
        grad_tokens = unpermute_tokens(grad_rows, inverse)
        return grad_tokens, grad_probabilities[inverse], grad_down, *grad_weights, None, None, None


def _sort_probabilities(probabilities: torch.Tensor, source: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return probabilities [tokens, k] in the sorted order of the token copies, [len(source)]; 0 in gaps."""
    return probabilities.new_zeros(len(source)).scatter_(0, inverse.flatten(), probabilities.flatten())


class Experts(torch.nn.Module):
    """The SwiGLU experts of this rank.

    Parameters: gate_proj and up_proj [E, hidden, M], down_proj [E, M, hidden]. E is the number of local experts. M is
    the expert width, divided by the expert-tensor-parallel size.
    """

    def __init__(self, num_local_experts: int, config: Any, pg_collection: Any) -> None:
        super().__init__()
        self.ep_group, self.tp_group, self.edp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size // self.tp_group.size()

        def weight(*shape: int) -> torch.nn.Parameter:
            parameter = new_parameter(config, num_local_experts, *shape)
            # Reduce gradients over the expert-data-parallel group. Megatron sets this mark only if EP > 1. Without the
            # mark, gradients are not reduced over TP if the experts are not tensor-parallel.
            parameter.allreduce = False  # type: ignore[attr-defined]
            return parameter

        self.gate_proj = weight(hidden, width)
        self.up_proj = weight(hidden, width)
        self.down_proj = weight(width, hidden)

    def forward(
        self, tokens: torch.Tensor, probabilities: torch.Tensor, chosen: torch.Tensor, order: ExpertPermutation
    ) -> torch.Tensor:
        """Return the sum over each token's k experts, weighted by `probabilities`: [tokens, hidden].

        Args:
            tokens: [tokens, hidden].
            probabilities: [tokens, k].
            chosen: int64 [tokens, k], local expert indices.
            order: the result of `sort_by_expert` for `chosen`.
        """
        alignment = EXPERT_ROW_ALIGNMENT[tokens.device.type] if len(tokens) else 1  # gaps point to token 0
        order = pad_expert_segments(order, chosen, alignment)
        # Autograd produces the gradients of inputs 1, 2, 3 in the order 1, 3, 2. For these weights that is from the
        # last parameter to the first, the order in which the buckets are reduced.
        weights = self.down_proj, self.gate_proj, self.up_proj
        result: torch.Tensor = SortedExperts.apply(tokens, probabilities.float(), *weights, *order)
        return result

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, ShardedTensor]:
        """Return each projection as this rank's shard of one global [num_experts, in, out] tensor."""
        assert not sharded_offsets
        ep, tp = self.ep_group, self.tp_group
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                getattr(self, name),
                (0, ep.rank(), ep.size()),
                (axis, tp.rank(), tp.size()),
                replica_id=(0, 0, self.edp_group.rank()),
            )
            for name, axis in (("gate_proj", 2), ("up_proj", 2), ("down_proj", 1))
        }
