"""Bytes that each data-parallel rank sends, receives and stores, from the owner ranks alone; the same for ZeRO-1 AdamW.

`tests/placement/test_traffic.py` compares these sums with counted collectives and memory. No torch.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields

from moonlight.config.run import RunConfig
from moonlight.placement.owners import RowShard

GRADIENT_BYTES = 4
"""Bytes of an element of a gradient sum on its owner rank, float32."""


@dataclass(frozen=True)
class CommBytes:
    """Bytes that one rank sends and receives."""

    sent: float = 0
    received: float = 0

    def __add__(self, other: "CommBytes") -> "CommBytes":
        return CommBytes(self.sent + other.sent, self.received + other.received)

    @property
    def larger(self) -> float:
        """The larger of sent and received bytes."""
        return max(self.sent, self.received)


@dataclass
class OptimizerCost:
    """Bytes of one rank in one data-parallel group: communication of one step, and optimizer state."""

    gradients: CommBytes = field(default_factory=CommBytes)
    """Gradients to their owner ranks."""
    matrices: CommBytes = field(default_factory=CommBytes)
    """Rows of matrices with several owner ranks, to the home rank and back."""
    weights: CommBytes = field(default_factory=CommBytes)
    """Updated weights from their owner ranks to all ranks."""
    masters: float = 0
    momenta: float = 0
    """Momenta of Muon, and both moments of AdamW."""

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
        return OptimizerCost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def muon_costs(
    shards: Sequence[RowShard], num_ranks: int, config: RunConfig, shared_embeddings: Collection[int] = ()
) -> list[OptimizerCost]:
    """Return the cost of every rank of a group under distributed Muon.

    Counts gradients to their owner ranks, rows of split matrices to the home rank and back, and weights to all ranks.

    Args:
        shards: every row of the group's parameters once, with its owner rank.
        shared_embeddings: indices of parameters of which two pipeline stages hold a copy. The owner ranks of both
            stages add their gradients.
    """
    total = sum(shard.numel for shard in shards)
    grad, weight, direction = gradient_bytes(config), weight_bytes(config), direction_bytes(config)
    owned, embedding_bytes, masters, momenta, row_bytes = ([0] * num_ranks for _ in range(5))
    for shard in shards:
        owner, numel = shard.owner_rank, shard.numel
        owned[owner] += numel
        masters[owner] += numel * master_bytes(config)
        momenta[owner] += numel * (momentum_bytes(config) if shard.matrix_rows else 8)
        if shard.param_index in shared_embeddings:
            embedding_bytes[owner] += numel * GRADIENT_BYTES
        if shard.is_split and owner != shard.home_rank:
            row_bytes[owner] += numel * direction
            row_bytes[shard.home_rank] += numel * direction
    num_peers = num_ranks - 1
    return [
        OptimizerCost(
            CommBytes((total - numel) * grad + embedding_bytes[rank], num_peers * numel * grad + embedding_bytes[rank]),
            CommBytes(row_bytes[rank], row_bytes[rank]),
            CommBytes(num_peers * numel * weight, (total - numel) * weight),
            masters[rank],
            momenta[rank],
        )
        for rank, numel in enumerate(owned)
    ]


def zero1_cost(numel: int, num_ranks: int, config: RunConfig, num_shared: int = 0) -> OptimizerCost:
    """Return the cost of each rank under AdamW with ZeRO-1 and no padding: a reduce-scatter, then an all-gather.

    Args:
        numel: elements of the group's parameters.
        num_shared: elements among `numel` of which two pipeline stages hold a copy.
    """
    weight, ring = weight_bytes(config), numel * (num_ranks - 1) / num_ranks
    gradients = ring * gradient_bytes(config) + num_shared * GRADIENT_BYTES / num_ranks
    weights = CommBytes(ring * weight, ring * weight)
    masters = 0 if weight == 4 else 4 * numel / num_ranks
    return OptimizerCost(CommBytes(gradients, gradients), CommBytes(), weights, masters, numel * 8 / num_ranks)


def weight_bytes(config: RunConfig) -> int:
    """Return the bytes of an element of the model's weights."""
    return 2 if config.train.dtype == "bfloat16" else 4


def gradient_bytes(config: RunConfig) -> int:
    """Return the bytes of an element of a gradient sum before and during the reduce-scatter."""
    return 2 if config.optimizer.gradient_dtype == "bfloat16" else 4


def master_bytes(config: RunConfig) -> int:
    """Return the bytes of an element of the master weights, in addition to the model's weights."""
    return 0 if weight_bytes(config) == 4 else {"float32": 4, "split": 2}[config.optimizer.master_weights]


def momentum_bytes(config: RunConfig) -> int:
    """Return the bytes of an element of Muon's momentum."""
    return 2 if config.optimizer.momentum_dtype == "bfloat16" else 4


def direction_bytes(config: RunConfig) -> int:
    """Return the bytes of an element of the directions as ranks exchange and orthogonalize them."""
    return 2 if config.optimizer.newton_schulz_dtype == "bfloat16" else 4
