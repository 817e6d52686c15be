"""What each data-parallel rank sends, receives and keeps for its share, from the owners alone, and what AdamW would.

`tests/test_traffic.py` holds these sums to what is counted on the wire and in memory. No torch.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from moonlight.config import Run
from moonlight.optim.partition import Fragment

GRADIENT_BYTES = 4


@dataclass
class Share:
    """Bytes of one rank for one data-parallel group: on the wire in one step, and of optimizer state."""

    sent: int = 0
    received: int = 0
    state: int = 0


def shares(fragments: Sequence[Fragment], num_ranks: int, run: Run, on_two_stages: Collection[int] = ()) -> list[Share]:
    """Of every rank of a group: gradients to their owners, cut matrices to their home and back, weights to all.

    Args:
        on_two_stages: parameters of which two pipeline stages hold a copy, and whose gradients their owners add up.
    """
    total = sum(fragment.numel for fragment in fragments)
    weight = weight_bytes(run)
    master = 0 if weight == 4 else {"float32": 4, "split": 2}[run.optimizer.master_weights]
    muon = 2 if run.optimizer.momentum_dtype == "bfloat16" else 4
    direction = 2 if run.optimizer.newton_schulz_dtype == "bfloat16" else 4
    owned = [0] * num_ranks
    found = [Share() for _ in range(num_ranks)]
    for fragment in fragments:
        owned[fragment.owner] += fragment.numel
        momenta = muon if fragment.matrix_rows else 8
        found[fragment.owner].state += fragment.numel * (master + momenta)
        if fragment.parameter in on_two_stages:
            found[fragment.owner].sent += fragment.numel * GRADIENT_BYTES
            found[fragment.owner].received += fragment.numel * GRADIENT_BYTES
        if fragment.is_cut and fragment.owner != fragment.home:
            for rank in (fragment.owner, fragment.home):
                found[rank].sent += fragment.numel * direction
                found[rank].received += fragment.numel * direction
    for share, mine in zip(found, owned, strict=True):
        share.sent += (total - mine) * GRADIENT_BYTES + (num_ranks - 1) * mine * weight
        share.received += (num_ranks - 1) * mine * GRADIENT_BYTES + (total - mine) * weight
    return found


def adamw_share(numel: int, num_ranks: int, run: Run, num_on_two_stages: int = 0) -> Share:
    """Of every rank under AdamW with sharded state (ZeRO-1) and no padding: reduce-scatter, then all-gather.

    Args:
        num_on_two_stages: elements among `numel` of which two pipeline stages hold a copy.
    """
    weight = weight_bytes(run)
    wire = numel * (GRADIENT_BYTES + weight) * (num_ranks - 1) // num_ranks
    wire += num_on_two_stages * GRADIENT_BYTES // num_ranks
    return Share(wire, wire, numel * (8 if weight == 4 else 12) // num_ranks)


def weight_bytes(run: Run) -> int:
    """Of one element of the model."""
    return 2 if run.train.dtype == "bfloat16" else 4
