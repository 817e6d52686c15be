"""Sigmoid router with bias balancing and the sequence-wise auxiliary loss (DeepSeek-V3, arXiv 2412.19437, 2.1.2)."""

from typing import Any

import torch
import torch.nn.functional as F

from moonlight.model.linear import new_parameter


def choose_experts(
    scores: torch.Tensor, bias: torch.Tensor, num_experts_per_tok: int, num_groups: int, topk_group: int
) -> torch.Tensor:
    """Return the indices of the experts with the highest score plus bias: int64 [tokens, num_experts_per_tok].

    `scores` [tokens, experts] and `bias` [experts] are float32. With groups, only experts of the `topk_group` best
    groups are eligible. The score of a group is the sum of its two best experts, as in transformers. (Megatron sums the
    best num_experts_per_tok / topk_group.)
    """
    candidates = scores + bias
    if num_groups > 1:
        grouped = candidates.unflatten(-1, (num_groups, -1))  # [tokens, groups, experts per group]
        group_scores = grouped.topk(2, dim=-1).values.sum(-1)
        best = group_scores.topk(topk_group, dim=-1).indices
        excluded = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, best, False)
        candidates = grouped.masked_fill(excluded.unsqueeze(-1), float("-inf")).flatten(-2)
    return candidates.topk(num_experts_per_tok, dim=-1).indices


class _AddLossGradient(torch.autograd.Function):
    """Return `weights` unchanged; the backward pass through them also starts the backward pass of the scalar `loss`."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, grad.new_ones(())


class Router(torch.nn.Module):
    """Choose the experts of each token. Weight [experts, hidden]; scores are float32 in every precision.

    `expert_bias` [experts] affects only the choice, never the weights of the mixture. `tokens_per_expert` counts this
    rank's choices since the last call of `update_expert_bias`, which computes the next bias from all ranks' counts.
    """

    def __init__(self, config: Any, pg_collection: Any) -> None:
        super().__init__()
        self.config = config
        self.tp_group = pg_collection.tp
        device = torch.cuda.current_device()
        self.expert_bias: torch.Tensor
        self.tokens_per_expert: torch.Tensor
        self.aux_loss: torch.Tensor
        self.weight = new_parameter(config, config.num_moe_experts, config.hidden_size)
        zeros = torch.zeros(config.num_moe_experts, dtype=torch.float32, device=device)
        self.register_buffer("expert_bias", zeros)
        self.register_buffer("tokens_per_expert", zeros.clone(), persistent=False)
        self.register_buffer("aux_loss", torch.zeros((), device=device), persistent=False)
        self.aux_loss_weight = 0.0
        """Auxiliary loss coefficient / sequences in the global batch; set by the training step."""
        self.layer_number = 0

    def set_layer_number(self, layer_number: int) -> None:
        """Set the number of the layer, from 1; Megatron's layer calls this method."""
        self.layer_number = layer_number

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route `hidden` [sequence, batch, hidden].

        Returns:
            The mixture weights, float32, and the chosen experts, int64; both [tokens, num_experts_per_tok].
        """
        config = self.config
        logits = F.linear(hidden.float(), self.weight.float())
        scores = logits.sigmoid().flatten(0, 1)  # [tokens, experts]
        chosen = choose_experts(
            scores.detach(),
            self.expert_bias,
            config.moe_router_topk,
            config.moe_router_num_groups or 1,
            config.moe_router_group_topk or 1,
        )
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * config.moe_router_topk_scaling_factor
        if self.training and torch.is_grad_enabled():
            self.tokens_per_expert.scatter_add_(0, chosen.view(-1), torch.ones_like(weights).view(-1))
            if self.aux_loss_weight > 0:
                loss = self._sequence_aux_loss(scores.view(logits.shape))
                self.aux_loss += loss.detach()
                weights = _AddLossGradient.apply(weights, loss * self.aux_loss_weight)
        return weights, chosen

    def _sequence_aux_loss(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the sum over this micro-batch's sequences of sum_i f_i P_i (DeepSeek-V3, eq. 17-20): a scalar.

        `scores` is [sequence / TP, batch, experts]. The coefficient is not included. Under sequence parallelism the
        ranks' values add up to the full loss: f counts the choices of all ranks, P is this rank's term of the mean. f
        ignores the bias, as in eq. 18.
        """
        top_k, num_experts = self.config.moe_router_topk, scores.shape[-1]
        length = scores.shape[0] * self.tp_group.size()
        chosen = scores.detach().topk(top_k, dim=-1).indices
        counts = torch.zeros_like(scores).scatter(-1, chosen, 1.0).sum(0)  # [batch, experts]
        if self.tp_group.size() > 1:
            torch.distributed.all_reduce(counts, group=self.tp_group)
        fractions = counts * (num_experts / (top_k * length))
        means = (scores / scores.sum(-1, keepdim=True)).sum(0) / length
        return (fractions * means).sum()


@torch.no_grad()
def update_expert_bias(
    routers: list[Router], update_rate: float, group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """Apply Moonlight's balancing rule: b_i += u * (sign(e_i) - mean_j sign(e_j)), e_i = mean load - load_i.

    Call it once per step, on all ranks of `group`. Resets the counts.

    Args:
        update_rate: u in the formula.
        group: all ranks that process different tokens of these layers (tensor- and data-parallel).

    Returns:
        The load of the step: tokens per expert, float32 [len(routers), experts].
    """
    counts = torch.stack([router.tokens_per_expert for router in routers])
    torch.distributed.all_reduce(counts, group=group)
    signs = (counts.mean(-1, keepdim=True) - counts).sign()
    updates = update_rate * (signs - signs.mean(-1, keepdim=True))
    for router, update in zip(routers, updates, strict=True):
        router.expert_bias += update
        router.tokens_per_expert.zero_()
    return counts
