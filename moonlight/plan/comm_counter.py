"""Bytes that collectives send and receive, counted by process group.

Every call of torch.distributed, coalesced or not, ends in an operator of the namespace `c10d`. A dispatch mode
intercepts all operators of its thread, including those of autograd hooks. An unsupported operator raises
AssertionError, so no traffic is missed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

_SILENT = ("barrier", "monitored_barrier_", "check_for_nan")
"""Operators without payload."""


@dataclass
class CommStats:
    """Payload of one rank in one process group, in bytes, without what a rank sends to itself."""

    sent: float = 0.0
    received: float = 0.0
    collectives: int = 0

    def minus(self, other: "CommStats") -> "CommStats":
        """Return the difference of both counts, field by field."""
        return CommStats(self.sent - other.sent, self.received - other.received, self.collectives - other.collectives)

    @property
    def larger(self) -> float:
        """The larger direction."""
        return max(self.sent, self.received)


class CommCounter(TorchDispatchMode):
    """Count the traffic of a block: `with CommCounter() as counter: ...`, then `counter.stats(group)`.

    An all-reduce counts as a ring: 2 (W - 1) / W of its tensor in each direction, with W ranks. In all other
    collectives each rank sends its part directly to the ranks that need it. If parts are equal, a ring has the same
    payload.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stats: dict[str, CommStats] = {}

    def stats(self, group: dist.ProcessGroup) -> CommStats:
        """Return the counts of a group so far."""
        return self._stats.setdefault(group.group_name, CommStats())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            name = func._schema.name.split("::")[1]
            assert func.namespace == "c10d" or name == "wait_tensor", f"{func} is an unsupported collective"
            if func.namespace == "c10d" and name not in _SILENT:
                inputs = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
                inputs |= kwargs or {}
                group = dist.ProcessGroup.unbox(inputs["process_group"])
                sent, received = _payload(name, inputs, group.size(), group.rank())
                stats = self.stats(group)
                stats.sent += sent
                stats.received += received
                stats.collectives += 1
        return func(*args, **(kwargs or {}))


def _payload(name: str, inputs: dict[str, Any], size: int, rank: int) -> tuple[float, float]:
    """Return bytes (sent, received) of one call on this rank."""
    num_peers = size - 1
    tensors = _bytes(inputs.get("tensors", ()))
    # All-gathers, reduce-scatters, scatter and gather name their arguments input_tensors, outputs, output_lists, ...
    sources, results = (
        sum(_bytes(value) for key, value in inputs.items() if key.startswith(prefix) and "split_sizes" not in key)
        for prefix in ("input", "output")
    )
    is_root = inputs.get("root_rank") == rank
    match name:
        case "allreduce_" | "allreduce_coalesced_":
            ring = 2 * num_peers * tensors / size
            return ring, ring
        case "alltoall_base_":
            local_sent, local_received = (
                _local_bytes(inputs[key], inputs[f"{key}_split_sizes"], size, rank) for key in ("input", "output")
            )
            return sources - local_sent, results - local_received
        case "alltoall_":
            return sources - _bytes(inputs["input_tensors"][rank]), results - _bytes(inputs["output_tensors"][rank])
        case "_allgather_base_" | "allgather_into_tensor_coalesced_" | "allgather_" | "allgather_coalesced_":
            return num_peers * sources, results - sources
        case "_reduce_scatter_base_" | "reduce_scatter_tensor_coalesced_" | "reduce_scatter_":
            return sources - results, num_peers * results
        case "broadcast_":
            return (num_peers * tensors, 0) if is_root else (0, tensors)
        case "reduce_":
            return (0, num_peers * tensors) if is_root else (tensors, 0)
        case "scatter_":
            return (sources - results, 0) if is_root else (0, results)
        case "gather_":
            return (0, results - sources) if is_root else (sources, 0)
        case "send":
            return tensors, 0
        case "recv_" | "recv_any_source_":
            return 0, tensors
    raise AssertionError(f"c10d::{name} is an unsupported collective")


def _bytes(tensors: Any) -> int:
    """Return the bytes of a tensor, or of all tensors in nested lists."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)


def _local_bytes(tensor: torch.Tensor, split_sizes: Sequence[int], size: int, rank: int) -> float:
    """Return the bytes of a tensor that this rank sends to itself. Empty split sizes mean equal parts."""
    if not split_sizes:
        return _bytes(tensor) / size
    return _bytes(tensor) * split_sizes[rank] / max(1, len(tensor))
