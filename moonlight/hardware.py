"""GPUs as their makers describe them."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class GpuSpec:
    """One kind of GPU in a node of eight."""

    memory_bytes: float
    """As CUDA reports it."""
    peak_flops_per_second: float
    """bfloat16 matrix products, dense."""
    node_bytes_per_second: float
    """To other GPUs of the node, each direction."""
    network_bytes_per_second: float
    """To GPUs of other nodes, each direction."""


GPUS = {
    # H100 SXM data sheet: 80 GB, 989 TFLOP/s, NVLink 900 GB/s both ways together; DGX H100: ConnectX-7, 400 Gb/s a GPU.
    "h100": GpuSpec(
        memory_bytes=79.1 * GIB,
        peak_flops_per_second=989e12,
        node_bytes_per_second=450e9,
        network_bytes_per_second=50e9,
    ),
    # H800: an H100 whose NVLink has 400 GB/s both ways together (DeepSeek-V3, arXiv 2412.19437, 3.1).
    "h800": GpuSpec(
        memory_bytes=79.1 * GIB,
        peak_flops_per_second=989e12,
        node_bytes_per_second=200e9,
        network_bytes_per_second=50e9,
    ),
    # H200 SXM data sheet: an H100 with 141 GB.
    "h200": GpuSpec(
        memory_bytes=139.8 * GIB,
        peak_flops_per_second=989e12,
        node_bytes_per_second=450e9,
        network_bytes_per_second=50e9,
    ),
    # A100 SXM data sheet: 80 GB, 312 TFLOP/s, NVLink 600 GB/s both ways together; DGX A100: ConnectX-6, 200 Gb/s a GPU.
    "a100": GpuSpec(
        memory_bytes=79.1 * GIB,
        peak_flops_per_second=312e12,
        node_bytes_per_second=300e9,
        network_bytes_per_second=25e9,
    ),
    # DGX B200 data sheet: 1,440 GB of eight, 18 PFLOP/s dense of eight, NVLink 1.8 TB/s; ConnectX-7, 400 Gb/s a GPU.
    "b200": GpuSpec(
        memory_bytes=178.0 * GIB,
        peak_flops_per_second=2250e12,
        node_bytes_per_second=900e9,
        network_bytes_per_second=50e9,
    ),
}


def peak_flops_per_second(device_name: str) -> float | None:
    """Of dense bfloat16 matrix products on a GPU, by the name that CUDA gives it; None if it is not known here.

    PCIe and NVL cards are slower than those of GPUS, and a part of a GPU (MIG) is, too.
    """
    words = device_name.lower().replace("-", " ").split()
    if {"pcie", "nvl", "mig"} & set(words):
        return None
    return next((gpu.peak_flops_per_second for name, gpu in GPUS.items() if name in words), None)
