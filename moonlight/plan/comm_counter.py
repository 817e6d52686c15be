"""Bytes that collectives put on the wire, counted by process group.

Every call of torch.distributed, coalesced or not, ends in an operator of the namespace `c10d`, and a dispatch mode sees
all operators of its thread: those of the autograd hooks too. An operator that is not known here is an error, so nothing
can pass uncounted.
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
    """Payload of one rank in one process group, in bytes. What a rank gives itself does not count."""

    sent: float = 0.0
    received: float = 0.0
    collectives: int = 0

    def minus(self, other: "CommStats") -> "CommStats":
        """What this has besides the other."""
        return CommStats(self.sent - other.sent, self.received - other.received, self.collectives - other.collectives)

    @property
    def larger(self) -> float:
        """The larger direction."""
        return max(self.sent, self.received)


class CommCounter(TorchDispatchMode):
    """Counts while it is entered: `with CommCounter() as counter: ...`, then `counter.of(group)`.

    An all-reduce counts as a ring's, 2 (W - 1) / W of its tensor each way; in all others every rank sends its part
    straight to whoever needs it, which is also a ring's payload where parts are even.
    """

    def __init__(self) -> None:
        super().__init__()
        self._of: dict[str, CommStats] = {}

    def stats(self, group: dist.ProcessGroup) -> CommStats:
        """What was counted for a group so far."""
        return self._of.setdefault(group.group_name, CommStats())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            name = func._schema.name.split("::")[1]
            assert func.namespace == "c10d" or name == "wait_tensor", f"{func}: not a collective that is counted"
            if func.namespace == "c10d" and name not in _SILENT:
                given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
                given |= kwargs or {}
                group = dist.ProcessGroup.unbox(given["process_group"])
                sent, received = _payload(name, given, group.size(), group.rank())
                traffic = self.stats(group)
                traffic.sent += sent
                traffic.received += received
                traffic.collectives += 1
        return func(*args, **(kwargs or {}))


def _payload(name: str, given: dict[str, Any], size: int, rank: int) -> tuple[float, float]:
    """(sent, received) of one call on this rank."""
    others = size - 1
    match name:
        case "allreduce_" | "allreduce_coalesced_":
            ring = 2 * others * _bytes(given["tensors"]) / size
            return ring, ring
        case "alltoall_base_":
            sent = _bytes(given["input"]) - _own_part(given["input"], given["input_split_sizes"], size, rank)
            return sent, _bytes(given["output"]) - _own_part(given["output"], given["output_split_sizes"], size, rank)
        case "alltoall_":
            outgoing, incoming = given["input_tensors"], given["output_tensors"]
            return _bytes(outgoing) - _bytes(outgoing[rank]), _bytes(incoming) - _bytes(incoming[rank])
        case "_allgather_base_":
            return others * _bytes(given["input_tensor"]), _bytes(given["output_tensor"]) * others / size
        case "allgather_into_tensor_coalesced_":
            return others * _bytes(given["inputs"]), _bytes(given["outputs"]) * others / size
        case "allgather_":
            mine = _bytes(given["input_tensors"])
            return others * mine, _bytes(given["output_tensors"]) - mine
        case "allgather_coalesced_":
            mine = _bytes(given["input_list"])
            return others * mine, _bytes(given["output_lists"]) - mine
        case "_reduce_scatter_base_":
            return _bytes(given["input_tensor"]) * others / size, others * _bytes(given["output_tensor"])
        case "reduce_scatter_tensor_coalesced_":
            return _bytes(given["inputs"]) * others / size, others * _bytes(given["outputs"])
        case "reduce_scatter_":
            mine = _bytes(given["output_tensors"])
            return _bytes(given["input_tensors"]) - mine, others * mine
        case "broadcast_":
            payload = _bytes(given["tensors"])
            return (others * payload, 0) if given["root_rank"] == rank else (0, payload)
        case "reduce_":
            payload = _bytes(given["tensors"])
            return (0, others * payload) if given["root_rank"] == rank else (payload, 0)
        case "scatter_":
            mine = _bytes(given["output_tensors"])
            return (_bytes(given["input_tensors"]) - mine, 0) if given["root_rank"] == rank else (0, mine)
        case "gather_":
            mine = _bytes(given["input_tensors"])
            return (0, _bytes(given["output_tensors"]) - mine) if given["root_rank"] == rank else (mine, 0)
        case "send":
            return _bytes(given["tensors"]), 0
        case "recv_" | "recv_any_source_":
            return 0, _bytes(given["tensors"])
    raise AssertionError(f"c10d::{name}: not a collective that is counted")


def _bytes(tensors: Any) -> int:
    """Of a tensor, or of all in a nest of lists."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)


def _own_part(tensor: torch.Tensor, split_sizes: Sequence[int], size: int, rank: int) -> float:
    """Bytes of a tensor that this rank exchanges with itself. No split sizes mean even ones."""
    if not split_sizes:
        return _bytes(tensor) / size
    return _bytes(tensor) * split_sizes[rank] / max(1, len(tensor))
