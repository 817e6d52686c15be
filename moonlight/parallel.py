"""Processes and process groups: joining the world, Megatron's groups for a layout, and leaving cleanly."""

import gc
import os
import sys
from datetime import timedelta

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from moonlight.config.parallel import ParallelConfig

RENDEZVOUS_FILE = "MOONLIGHT_RENDEZVOUS_FILE"
"""Set by our own launcher for local processes; torchrun sets MASTER_ADDR and MASTER_PORT instead."""
RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"
"""How often the launcher has started its processes again; set by torchrun, and by our own launcher likewise."""


def world_size() -> int:
    """Processes in the world, from the environment; 1 when nothing launched us."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number in the world, from the environment."""
    return int(os.environ.get("RANK", "0"))


def init_distributed(threads: int = 0, timeout: timedelta = timedelta(minutes=10)) -> None:
    """Create the default process group from the launcher's environment: NCCL with CUDA, gloo without.

    Args:
        threads: CPU threads of this process; 0 leaves them as they are (OMP_NUM_THREADS, or all cores).
        timeout: how long a process waits for the others in one exchange, as NCCL and gloo apply it.
    """
    if threads:
        torch.set_num_threads(threads)
    if RENDEZVOUS_FILE in os.environ:
        _use_loopback()
        method = f"file://{os.environ[RENDEZVOUS_FILE]}"
    elif "MASTER_ADDR" in os.environ:
        method = "env://"
    else:
        init_single_process()
        return
    dist.init_process_group(_backend(), init_method=method, rank=rank(), world_size=world_size(), timeout=timeout)


def init_single_process() -> None:
    """A world of this process only."""
    _use_loopback()
    dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)


def _use_loopback() -> None:
    """Keep gloo's traffic on this machine, whatever its host name resolves to."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _backend() -> str:
    if not torch.cuda.is_available():
        return "gloo"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return "nccl"


def init_model_parallel(parallel: ParallelConfig, seed: int, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Megatron's process groups for a layout, replacing any that exist, and its random streams.

    The world size must be divisible by the layout (`ParallelConfig.data_parallel_size` says so to the user).
    """
    parallel.data_parallel_size(dist.get_world_size())
    parallel_state.destroy_model_parallel()
    virtual = parallel.virtual_pipeline_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        expert_model_parallel_size=parallel.expert_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout / timedelta(minutes=1),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def destroy_distributed() -> None:
    """Drop every group of this process, and the threads that serve them.

    A group lives as long as anything names it: modules name groups, and models are cycles that only the garbage
    collector frees.
    """
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
