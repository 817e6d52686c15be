"""What each data-parallel rank sends, receives and keeps for its share, from the owners alone, and what AdamW would.

`tests/placement/test_traffic.py` holds these sums to what is counted on the wire and in memory. No torch.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from moonlight.config.run import RunConfig
from moonlight.placement.owners import RowShard

GRADIENT_BYTES = 4
"""Of one element of what an owner has added up."""


@dataclass(frozen=True)
class CommBytes:
    """Bytes of one rank on the wire."""

    sent: float = 0
    received: float = 0

    def __add__(self, other: "CommBytes") -> "CommBytes":
        return CommBytes(self.sent + other.sent, self.received + other.received)

    @property
    def larger(self) -> float:
        """The larger direction."""
        return max(self.sent, self.received)


@dataclass
class OptimizerCost:
    """Bytes of one rank for one data-parallel group: on the wire in one step, and of optimizer state."""

    gradients: CommBytes = field(default_factory=CommBytes)
    """To their owners."""
    matrices: CommBytes = field(default_factory=CommBytes)
    """Rows of matrices with several owners to the one that orthogonalises them, and back."""
    weights: CommBytes = field(default_factory=CommBytes)
    """From their owners to all."""
    masters: float = 0
    momenta: float = 0

    @property
    def sent(self) -> float:
        return self.gradients.sent + self.matrices.sent + self.weights.sent

    @property
    def received(self) -> float:
        return self.gradients.received + self.matrices.received + self.weights.received

    @property
    def state(self) -> float:
        return self.masters + self.momenta

    def __add__(self, other: "OptimizerCost") -> "OptimizerCost":
        return OptimizerCost(
            self.gradients + other.gradients,
            self.matrices + other.matrices,
            self.weights + other.weights,
            self.masters + other.masters,
            self.momenta + other.momenta,
        )


def muon_costs(
    fragments: Sequence[RowShard], num_ranks: int, config: RunConfig, on_two_stages: Collection[int] = ()
) -> list[OptimizerCost]:
    """Of every rank of a group: gradients to their owners, cut matrices to their home and back, weights to all.

    Args:
        on_two_stages: parameters of which two pipeline stages hold a copy, and whose gradients their owners add up.
    """
    total = sum(fragment.numel for fragment in fragments)
    weight, direction = weight_bytes(config), direction_bytes(config)
    owned, twice, masters, momenta, rows_moved = ([0] * num_ranks for _ in range(5))
    for fragment in fragments:
        owner, numel = fragment.owner_rank, fragment.numel
        owned[owner] += numel
        masters[owner] += numel * master_bytes(config)
        momenta[owner] += numel * (momentum_bytes(config) if fragment.matrix_rows else 8)
        if fragment.param_index in on_two_stages:
            twice[owner] += numel * GRADIENT_BYTES
        if fragment.is_split and owner != fragment.home_rank:
            rows_moved[owner] += numel * direction
            rows_moved[fragment.home_rank] += numel * direction
    others = num_ranks - 1
    return [
        OptimizerCost(
            CommBytes(
                (total - mine) * gradient_bytes(config) + twice[rank],
                others * mine * gradient_bytes(config) + twice[rank],
            ),
            CommBytes(rows_moved[rank], rows_moved[rank]),
            CommBytes(others * mine * weight, (total - mine) * weight),
            masters[rank],
            momenta[rank],
        )
        for rank, mine in enumerate(owned)
    ]


def zero1_cost(numel: int, num_ranks: int, config: RunConfig, num_on_two_stages: int = 0) -> OptimizerCost:
    """Of every rank under AdamW with sharded state (ZeRO-1) and no padding: reduce-scatter, then all-gather.

    Args:
        num_on_two_stages: elements among `numel` of which two pipeline stages hold a copy.
    """
    weight, ring = weight_bytes(config), numel * (num_ranks - 1) / num_ranks
    gradients = ring * gradient_bytes(config) + num_on_two_stages * GRADIENT_BYTES / num_ranks
    masters = 0 if weight == 4 else 4 * numel / num_ranks
    return OptimizerCost(
        CommBytes(gradients, gradients),
        CommBytes(),
        CommBytes(ring * weight, ring * weight),
        masters,
        numel * 8 / num_ranks,
    )


def weight_bytes(config: RunConfig) -> int:
    """Of one element of the model."""
    return 2 if config.train.dtype == "bfloat16" else 4


def gradient_bytes(config: RunConfig) -> int:
    """Of one element of a gradient sum before the exchange, and on the wire."""
    return 2 if config.optimizer.gradient_dtype == "bfloat16" else 4


def master_bytes(config: RunConfig) -> int:
    """Of one element's master weight, beyond the model's own."""
    return 0 if weight_bytes(config) == 4 else {"float32": 4, "split": 2}[config.optimizer.master_weights]


def momentum_bytes(config: RunConfig) -> int:
    """Of one element's momentum under Muon."""
    return 2 if config.optimizer.momentum_dtype == "bfloat16" else 4


def direction_bytes(config: RunConfig) -> int:
    """Of one element of what is orthogonalised."""
    return 2 if config.optimizer.newton_schulz_dtype == "bfloat16" else 4
