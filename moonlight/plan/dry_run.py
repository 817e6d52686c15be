"""Dry run: one rank of a large world with its real groups, model and optimizer, without peers and without memory.

Collectives use torch's fake backend, which transfers nothing. Tensors are on torch's meta device: they have shapes,
dtypes and views, but no values. A laptop can therefore count a rank of a cluster. This module uses no formula of
`moonlight.plan`, so the two results check each other.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import moonlight.megatron_compat

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from moonlight import parallel
from moonlight.config.run import RunConfig
from moonlight.model.build import build_model
from moonlight.optim.distributed_muon import DistributedMuon, build_optimizer
from moonlight.optim.parameters import data_parallel_group, embedding_group, tensor_parallel_group
from moonlight.plan.comm_counter import CommCounter, CommStats

META = torch.device("meta")


@contextlib.contextmanager
def fake_rank(config: RunConfig, world_size: int, rank: int) -> Iterator[list[GPTModel]]:
    """Yield this rank's model chunks in a fake world of `world_size`, on the meta device.

    Tensors created inside the block are on the meta device, too. Operations that need values (a forward pass that sends
    tokens to experts, a norm as a number) raise torch's error.

    Raises:
        UserError: the layout does not divide the world.
    """
    assert not dist.is_initialized(), "torch.distributed is already initialized"
    assert 0 <= rank < world_size, (rank, world_size)
    config.parallel.data_parallel_size(world_size)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel.init_model_parallel(config.parallel, config.train.seed)
        with moonlight.megatron_compat.override_current_device(META), META:
            yield build_model(config)
    finally:
        parallel.destroy_distributed()


@dataclass(frozen=True)
class DryRunCounts:
    """Memory and communication of one rank; all sizes in bytes."""

    num_parameters: int
    """Elements of this rank's part of the model, without router biases."""
    weights: int
    buffers: int
    gradient_sums: int
    gradient_shards: int
    """Sums over all data-parallel ranks of the rows that this rank owns; 0 without data-parallel peers."""
    optimizer: int
    """Master weights and momenta, as the optimizer reports them."""
    all_state: int
    """Every tensor that exists between two steps: all of the above, counted tensor by tensor."""
    exchange_buffers: int
    """Peak of buffers in flight between data-parallel ranks."""
    update: int
    """Peak of an update above the state."""
    gradient_stats: dict[str, CommStats]
    """By group: dense, expert (data-parallel), slices, expert slices (tensor-parallel), embedding (two stages)."""
    matrix_stats: dict[str, CommStats]
    """Shards of matrices to the rank that orthogonalizes them, and back, by the same groups."""
    weight_stats: dict[str, CommStats]
    """By the same groups."""


class MetaMemory(TorchDispatchMode):
    """Count the live bytes of all tensors created in a block, and their peak.

    Raises:
        AssertionError: a tensor is not on the meta device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.track(_tensors(result))
        if func.namespace == "c10d" and "alltoall_base_" in func._schema.name:
            # A real exchange holds its input until it completes. The fake one completes immediately.
            output, sent = args[0], [args[1]]
            weakref.finalize(output.untyped_storage(), sent.clear)
        return result

    @contextlib.contextmanager
    def measure_peak(self) -> Iterator[list[int]]:
        """Measure the peak above the bytes at entry. The block's exit appends it to the yielded list."""
        peak: list[int] = []
        before = self.peak = self.live
        yield peak
        peak.append(self.peak - before)

    def track(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count the storages that are not counted yet, until they are freed."""
        for tensor in tensors:
            assert tensor.device == META, f"a tensor of a dry run is on {tensor.device}: it must be on {META}"
            storage = tensor.untyped_storage()
            tracked = self._storages.get(id(storage))
            if tracked is None or tracked() is not storage:
                size = storage.nbytes()
                self._storages[id(storage)] = weakref.ref(storage)
                weakref.finalize(storage, self._drop, id(storage), size)
                self.live += size
                self.peak = max(self.peak, self.live)

    def _drop(self, storage_id: int, size: int) -> None:
        self.live -= size
        self._storages.pop(storage_id, None)


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, list | tuple):
        for item in result:
            yield from _tensors(item)


def count_rank(config: RunConfig, world_size: int, rank: int) -> DryRunCounts:
    """Build one rank and run the optimizer step that follows a backward pass, including Newton-Schulz.

    The dry run omits operations that need values: forward and backward pass, and the gradient norm (one all-reduce of a
    number).

    Raises:
        UserError: the layout does not divide the world.
    """
    with fake_rank(config, world_size, rank) as model_chunks, MetaMemory() as memory:
        weights = [parameter for model in model_chunks for parameter in model.parameters()]
        buffers = [buffer for model in model_chunks for buffer in model.buffers()]
        memory.track([*weights, *buffers])
        optimizer = build_optimizer(model_chunks, config)
        state = memory.live
        data_parallel = optimizer.data_parallel
        is_tied = any(parameter.is_shared_embedding for parameter in data_parallel.parameters)
        data_parallel.zero_grad_buffer()
        gradient_stats, _ = _measure(memory, is_tied, data_parallel.finish_grad_sync)

        def update() -> None:
            optimizer.step(learning_rate=1e-3, weight_decay=0.1, step=1, gradient_norm=1.0)

        def return_weights() -> None:
            data_parallel.start_param_sync()
            data_parallel.finish_param_sync()

        update_stats, peak = _measure(memory, is_tied, update, data_parallel.finish_param_sync)
        weight_stats, _ = _measure(memory, is_tied, return_weights)
        return DryRunCounts(
            num_parameters=sum(parameter.numel() for parameter in weights),
            weights=_bytes(weights),
            buffers=_bytes(buffers),
            gradient_sums=_bytes([p.torch_param.main_grad for p in data_parallel.parameters]),  # type: ignore[attr-defined]
            gradient_shards=sum(
                _bytes([bucket.grad_shard])
                for bucket_group in data_parallel.bucket_groups
                for bucket in bucket_group.buckets
                if bucket.group.size() > 1
            ),
            optimizer=optimizer.state_bytes(),
            all_state=state,
            exchange_buffers=_exchange_buffers(optimizer, memory),
            update=peak,
            gradient_stats=gradient_stats,
            matrix_stats={name: update_stats[name].minus(weight_stats[name]) for name in update_stats},
            weight_stats=weight_stats,
        )


def _measure(
    memory: MetaMemory, is_tied: bool, first: Callable[[], None], then: Callable[[], None] = lambda: None
) -> tuple[dict[str, CommStats], int]:
    """Return the traffic of both calls by group, and the peak bytes of the first call.

    `is_tied`: two pipeline stages hold the embedding, which adds the group "embedding".
    """
    with CommCounter() as counter:
        with memory.measure_peak() as peak:
            first()
        then()
    groups = {
        "dense": data_parallel_group(expert=False),
        "expert": data_parallel_group(expert=True),
        "slices": tensor_parallel_group(expert=False),
        "expert slices": tensor_parallel_group(expert=True),
    }
    stats: dict[str, CommStats] = {}
    seen: set[str] = set()
    for name, group in groups.items():
        # Megatron uses one group for two purposes if both have the same ranks.
        stats[name] = CommStats() if group.group_name in seen else counter.stats(group)
        seen.add(group.group_name)
    stats["embedding"] = counter.stats(embedding_group()) if is_tied else CommStats()
    return stats, peak[0]


def _exchange_buffers(optimizer: DistributedMuon, memory: MetaMemory) -> int:
    """Return the peak bytes of gradients or of weights in flight, the larger.

    Both bucket groups are in flight simultaneously: gradients in the backward pass, weights in the forward pass.
    """
    gradients = weights = 0
    for bucket_group in optimizer.data_parallel.bucket_groups:
        with memory.measure_peak() as peak:
            bucket_group.start_backward()
            bucket_group.finish_grad_sync()
        gradients += peak[0]
        with memory.measure_peak() as peak:
            bucket_group.start_param_sync()
            bucket_group.finish_param_sync()
        weights += peak[0]
    return max(gradients, weights)


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
