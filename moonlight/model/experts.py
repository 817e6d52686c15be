"""Routed experts: one [experts, in, out] tensor per projection, multiplied by torch's grouped GEMM."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor


class Experts(torch.nn.Module):
    """The SwiGLU experts of this rank.

    Parameters, with E local experts and M the expert width of this rank (the whole width, or its share under expert
    tensor parallelism): gate_proj and up_proj [E, hidden, M], down_proj [E, M, hidden].
    """

    def __init__(self, num_local_experts: int, config: Any, pg_collection: Any) -> None:
        super().__init__()
        self.ep_group, self.tp_group, self.edp_group = (
            pg_collection.ep,
            pg_collection.expt_tp,
            pg_collection.expt_dp,
        )
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size // self.tp_group.size()

        def weight(*shape: int) -> torch.nn.Parameter:
            parameter = torch.nn.Parameter(
                torch.empty(num_local_experts, *shape, dtype=config.params_dtype, device=torch.cuda.current_device())
            )
            # Always reduced over the expert-data-parallel group. Megatron marks experts so only when EP > 1, which
            # leaves their gradients unreduced over TP when experts are not tensor-parallel themselves.
            parameter.allreduce = False  # type: ignore[attr-defined]
            return parameter

        self.gate_proj = weight(hidden, width)
        self.up_proj = weight(hidden, width)
        self.down_proj = weight(width, hidden)

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, probabilities: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Apply each expert to its run of `tokens` [tokens, hidden], sorted by expert, and scale by `probabilities`.

        `tokens_per_expert` is an integer tensor [E]; `probabilities` [tokens].
        """
        ends = tokens_per_expert.to(tokens.device).cumsum(0).to(torch.int32)
        gate = F.grouped_mm(tokens, self.gate_proj, offs=ends)
        up = F.grouped_mm(tokens, self.up_proj, offs=ends)
        inner = F.silu(gate) * up * probabilities.unsqueeze(-1).to(tokens.dtype)
        return F.grouped_mm(inner, self.down_proj, offs=ends), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, ShardedTensor]:
        """Every projection as this rank's part of one global [num_experts, in, out] tensor."""
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
