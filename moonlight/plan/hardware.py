"""What a plan divides its bytes and FLOPs by: a kind of GPU, at stated rates."""

from dataclasses import dataclass

from moonlight.errors import UserError
from moonlight.hardware import GPUS, GpuSpec
from moonlight.placement.comm_bytes import CommBytes

GPUS_OF_A_NODE = 8
"""Joined by NVLink; beyond it every GPU has a network card of its own."""


@dataclass(frozen=True, kw_only=True)
class HardwareModel:
    """The GPU, what of it can be used, and the storage for checkpoints."""

    name: str = "h100"
    memory_bytes: float = GPUS["h100"].memory_bytes
    efficiency: float = 0.35
    """Share of the peak that arithmetic reaches while it runs."""
    storage_bytes_per_second: float = 2e9
    """Of the whole job."""

    @property
    def gpu(self) -> GpuSpec:
        return GPUS[self.name]

    def arithmetic_seconds(self, flops: float) -> float:
        """At the stated efficiency."""
        return flops / (self.efficiency * self.gpu.peak_flops_per_second)

    def wire_seconds(self, flow: CommBytes, num_ranks: int, stride: int) -> float:
        """Of an exchange in which all ranks of a group send to all, at the full rate of the links.

        Ranks of the group are `stride` apart; those of one node and those beyond are reached at the same time.
        """
        if num_ranks == 1:
            return 0.0
        in_node = min(num_ranks, max(1, GPUS_OF_A_NODE // stride))
        beyond = (num_ranks - in_node) / (num_ranks - 1)
        return flow.larger * max(
            (1 - beyond) / self.gpu.node_bytes_per_second, beyond / self.gpu.network_bytes_per_second
        )


def hardware_model(
    name: str = "h100",
    memory_gb: float | None = None,
    efficiency: float = 0.35,
    storage_gb_per_second: float = 2.0,
) -> HardwareModel:
    """From the options of the command; gigabytes are 10^9 bytes.

    Raises:
        UserError: an unknown GPU, or a number out of range.
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
