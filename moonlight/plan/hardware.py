"""Rates that turn the bytes and FLOPs of a plan into seconds: one kind of GPU, its links, and the storage."""

from dataclasses import dataclass

from moonlight.errors import UserError
from moonlight.hardware import GPUS, GpuSpec
from moonlight.placement.comm_bytes import CommBytes

GPUS_PER_NODE = 8
"""NVLink connects the GPUs of a node. Between nodes, each GPU uses its own network card."""


@dataclass(frozen=True, kw_only=True)
class HardwareModel:
    """The GPU, its usable memory and efficiency, and the storage for checkpoints."""

    name: str = "h100"
    memory_bytes: float = GPUS["h100"].memory_bytes
    efficiency: float = 0.35
    """Fraction of peak FLOP/s that arithmetic reaches while it runs."""
    storage_bytes_per_second: float = 2e9
    """Checkpoint write rate of all ranks together."""

    @property
    def gpu(self) -> GpuSpec:
        return GPUS[self.name]

    def arithmetic_seconds(self, flops: float) -> float:
        """Return the time of `flops` on one GPU at `efficiency`."""
        return flops / (self.efficiency * self.gpu.peak_flops_per_second)

    def comm_seconds(self, comm_bytes: CommBytes, num_ranks: int, stride: int) -> float:
        """Return the time of an exchange in which each rank of a group sends to all others, at full link rate.

        Consecutive ranks of the group are `stride` apart. Transfers within the node and between nodes overlap.
        """
        if num_ranks == 1:
            return 0.0
        in_node = min(num_ranks, max(1, GPUS_PER_NODE // stride))
        between_nodes = (num_ranks - in_node) / (num_ranks - 1)
        return comm_bytes.larger * max(
            (1 - between_nodes) / self.gpu.node_bytes_per_second, between_nodes / self.gpu.network_bytes_per_second
        )


def hardware_model(
    name: str = "h100", memory_gb: float | None = None, efficiency: float = 0.35, storage_gb_per_second: float = 2.0
) -> HardwareModel:
    """Build the hardware model from the command's options. A gigabyte is 10^9 bytes.

    Raises:
        UserError: the GPU is unknown, or a number is out of range.
    """
    if name not in GPUS:
        raise UserError(f"--gpu is {name!r}: accepted are {', '.join(GPUS)}")
    if not 0 < efficiency <= 1:
        raise UserError(f"--efficiency is {efficiency}: it must be greater than 0 and at most 1")
    for option, value in (("--gpu-memory", memory_gb), ("--storage-gb-per-second", storage_gb_per_second)):
        if value is not None and not 0 < value < 1e9:
            raise UserError(f"{option} is {value}: it must be greater than 0 and less than 1e9 (gigabytes)")
    return HardwareModel(
        name=name,
        memory_bytes=GPUS[name].memory_bytes if memory_gb is None else memory_gb * 1e9,
        efficiency=efficiency,
        storage_bytes_per_second=storage_gb_per_second * 1e9,
    )
