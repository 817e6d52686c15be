"""Process groups: initialize torch.distributed, create Megatron's groups for a layout, and destroy all groups."""

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
"""Environment variable that `pretrain.local` sets; torchrun sets MASTER_ADDR and MASTER_PORT instead."""
RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"
"""Environment variable with the number of restarts; torchrun and `pretrain.local` set it."""


def world_size() -> int:
    """Return the world size from the environment; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the rank of this process from the environment; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def init_distributed(threads: int = 0, timeout: timedelta = timedelta(minutes=10)) -> None:
    """Create the default process group from the launcher's environment: NCCL with CUDA, gloo without.

    Args:
        threads: CPU threads of this process; 0 keeps the default (OMP_NUM_THREADS, or all cores).
        timeout: timeout of one collective, for NCCL and gloo.
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
    """Create a default process group of this process only."""
    _use_loopback()
    dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)


def _use_loopback() -> None:
    """Make gloo use the loopback interface, whatever the host name resolves to."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _backend() -> str:
    if not torch.cuda.is_available():
        return "gloo"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return "nccl"


def init_model_parallel(parallel: ParallelConfig, seed: int, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Create Megatron's process groups for a layout, replacing existing ones, and seed its random states. Collective.

    Args:
        parallel: the layout.
        seed: seed of Megatron's random states.
        timeout: timeout of one collective of these groups.

    Raises:
        UserError: the layout does not divide the world size.
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
    """Destroy every process group of this process, and the groups' threads.

    A group exists while an object references it. Modules reference groups, and models contain reference cycles, so the
    garbage collector must run.
    """
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
