"""One rank of a world that does not exist: its real groups, model and optimizer, without memory and without peers.

Collectives go to torch's fake backend, which moves nothing, and tensors are on torch's meta device: they have shapes,
dtypes and views, but no values. So a cluster's rank can be counted on a laptop. Nothing here knows the formulas of
`moonlight.plan`; each checks the other.
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
    """This rank's model chunks in a world of `world_size`. Whatever is made of them inside has no memory either.

    What needs values (a forward pass that sends tokens to experts, a norm as a number) raises an error of torch's.

    Raises:
        UserError: the layout does not divide the world.
    """
    assert not dist.is_initialized(), "a world exists already"
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
    """What one rank holds and exchanges; all sizes in bytes."""

    num_parameters: int
    """Elements of this rank's part of the model, router biases apart."""
    weights: int
    buffers: int
    gradient_sums: int
    gradient_shards: int
    """World's sums of the rows that this rank owns, where that is more than this rank's own sums."""
    optimizer: int
    """Master weights and momenta, as the optimizer says."""
    all_state: int
    """Of every tensor that is there between two steps: all of the above, counted one by one."""
    exchange_buffers: int
    """Most that is under way at once between data-parallel ranks."""
    update: int
    """Most that an update holds besides the state."""
    gradients_on_wire: dict[str, CommStats]
    """By group: dense, expert (data-parallel), slices, expert slices (tensor-parallel), embedding (two stages)."""
    matrices_on_wire: dict[str, CommStats]
    weights_on_wire: dict[str, CommStats]


class MetaMemory(TorchDispatchMode):
    """Bytes of the tensors made while it is entered, and their peak. Every tensor must be on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.see(_tensors(result))
        if func.namespace == "c10d" and "alltoall_base_" in func._schema.name:
            # A real exchange keeps what it sends until it has ended; the fake one ends at once.
            output, sent = args[0], [args[1]]
            weakref.finalize(output.untyped_storage(), sent.clear)
        return result

    @contextlib.contextmanager
    def above(self) -> Iterator[list[int]]:
        """The peak above what is there at the beginning, in a list that is filled at the end."""
        found: list[int] = []
        before = self.peak = self.live
        yield found
        found.append(self.peak - before)

    def see(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count those that are not counted yet."""
        for tensor in tensors:
            assert tensor.device == META, f"a tensor of a dry run is on {tensor.device}"
            storage = tensor.untyped_storage()
            known = self._storages.get(id(storage))
            if known is None or known() is not storage:
                size = storage.nbytes()
                self._storages[id(storage)] = weakref.ref(storage)
                weakref.finalize(storage, self._drop, id(storage), size)
                self.live += size
                self.peak = max(self.peak, self.live)

    def _drop(self, number: int, size: int) -> None:
        self.live -= size
        self._storages.pop(number, None)


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, list | tuple):
        for item in result:
            yield from _tensors(item)


def count_rank(config: RunConfig, world_size: int, rank: int) -> DryRunCounts:
    """Build one rank and run the optimizer step that would follow a backward pass, Newton-Schulz included.

    Left out is what needs values: forward and backward pass, and the norm of the gradient (one all-reduce of a number).
    """
    with fake_rank(config, world_size, rank) as models, MetaMemory() as memory:
        weights = [parameter for model in models for parameter in model.parameters()]
        buffers = [buffer for model in models for buffer in model.buffers()]
        memory.see([*weights, *buffers])
        optimizer = build_optimizer(models, config)
        state = memory.live
        data_parallel = optimizer.data_parallel
        twice = any(parameter.is_shared_embedding for parameter in data_parallel.parameters)
        data_parallel.zero_grad_buffer()
        gradients_on_wire, _ = _counted(memory, twice, data_parallel.finish_grad_sync)

        def update() -> None:
            optimizer.step(learning_rate=1e-3, weight_decay=0.1, step=1, gradient_norm=1.0)

        def return_weights() -> None:
            data_parallel.start_param_sync()
            data_parallel.finish_param_sync()

        updated, peak = _counted(memory, twice, update, data_parallel.finish_param_sync)
        weights_on_wire, _ = _counted(memory, twice, return_weights)
        return DryRunCounts(
            num_parameters=sum(parameter.numel() for parameter in weights),
            weights=_bytes(weights),
            buffers=_bytes(buffers),
            gradient_sums=_bytes([p.torch_param.main_grad for p in data_parallel.parameters]),  # type: ignore[attr-defined]
            gradient_shards=sum(
                _bytes([bucket.grad_shard])
                for lane in data_parallel.bucket_groups
                for bucket in lane.buckets
                if bucket.group.size() > 1
            ),
            optimizer=optimizer.state_bytes(),
            all_state=state,
            exchange_buffers=_exchange_buffers(optimizer, memory),
            update=peak,
            gradients_on_wire=gradients_on_wire,
            matrices_on_wire={name: updated[name].minus(weights_on_wire[name]) for name in updated},
            weights_on_wire=weights_on_wire,
        )


def _counted(
    memory: MetaMemory, on_two_stages: bool, first: Callable[[], None], then: Callable[[], None] = lambda: None
) -> tuple[dict[str, CommStats], int]:
    """Traffic of both calls, and the memory that the first needed for a time."""
    with CommCounter() as counter:
        with memory.above() as peak:
            first()
        then()
    groups = {
        "dense": data_parallel_group(expert=False),
        "expert": data_parallel_group(expert=True),
        "slices": tensor_parallel_group(expert=False),
        "expert slices": tensor_parallel_group(expert=True),
    }
    found: dict[str, CommStats] = {}
    seen: set[str] = set()
    for name, group in groups.items():
        # Megatron has one group for two purposes where their ranks are the same.
        found[name] = CommStats() if group.group_name in seen else counter.stats(group)
        seen.add(group.group_name)
    found["embedding"] = counter.stats(embedding_group()) if on_two_stages else CommStats()
    return found, peak[0]


def _exchange_buffers(optimizer: DistributedMuon, memory: MetaMemory) -> int:
    """Both lanes are under way at once in a step: gradients in the backward pass, weights in the forward pass."""
    gradients = weights = 0
    for lane in optimizer.data_parallel.bucket_groups:
        with memory.above() as peak:
            lane.start_backward()
            lane.finish_grad_sync()
        gradients += peak[0]
        with memory.above() as peak:
            lane.start_param_sync()
            lane.finish_param_sync()
        weights += peak[0]
    return max(gradients, weights)


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
