"""Data sheet numbers of GPUs."""

from dataclasses import dataclass, replace

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class GpuSpec:
    """One GPU model, in a node of eight."""

    memory_bytes: float
    """Memory in bytes, as CUDA reports it."""
    peak_flops_per_second: float
    """Peak of dense bfloat16 matrix products, in FLOP/s."""
    node_bytes_per_second: float
    """Bandwidth to other GPUs of the node in bytes/s, each direction."""
    network_bytes_per_second: float
    """Bandwidth to GPUs of other nodes in bytes/s, each direction."""


# NVLink totals count both directions.
# H100 SXM data sheet: 80 GB, 989 TFLOP/s, NVLink 900 GB/s in total; DGX H100: ConnectX-7, 400 Gb/s per GPU.
_H100 = GpuSpec(
    memory_bytes=79.1 * GIB, peak_flops_per_second=989e12, node_bytes_per_second=450e9, network_bytes_per_second=50e9
)
GPUS = {
    "h100": _H100,
    # H800: an H100 whose NVLink has 400 GB/s in total (DeepSeek-V3, arXiv 2412.19437, 3.1).
    "h800": replace(_H100, node_bytes_per_second=200e9),
    # H200 SXM data sheet: an H100 with 141 GB.
    "h200": replace(_H100, memory_bytes=139.8 * GIB),
    # A100 SXM data sheet: 80 GB, 312 TFLOP/s, NVLink 600 GB/s in total; DGX A100: ConnectX-6, 200 Gb/s per GPU.
    "a100": GpuSpec(
        memory_bytes=79.1 * GIB,
        peak_flops_per_second=312e12,
        node_bytes_per_second=300e9,
        network_bytes_per_second=25e9,
    ),
    # DGX B200 data sheet: 1,440 GB and 18 PFLOP/s dense for eight GPUs, NVLink 1.8 TB/s; ConnectX-7, 400 Gb/s per GPU.
    "b200": GpuSpec(
        memory_bytes=178.0 * GIB,
        peak_flops_per_second=2250e12,
        node_bytes_per_second=900e9,
        network_bytes_per_second=50e9,
    ),
}


def peak_flops_per_second(device_name: str) -> float | None:
    """Return the peak of dense bfloat16 matrix products in FLOP/s, by CUDA's device name; None if unknown.

    The result is None for PCIe and NVL cards and for parts of a GPU (MIG), which are slower than the GPUs in `GPUS`.
    """
    words = device_name.lower().replace("-", " ").split()
    if {"pcie", "nvl", "mig"} & set(words):
        return None
    return next((gpu.peak_flops_per_second for name, gpu in GPUS.items() if name in words), None)
