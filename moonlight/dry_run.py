"""One rank of a world that does not exist: its groups and its model, without memory and without peers.

Collectives go to torch's fake backend, which moves nothing, and tensors are fake: they have shapes, dtypes and views,
but no values. So the exchange of a cluster can be counted, and its owners read, on a laptop.
"""

import contextlib
from collections.abc import Iterator

import moonlight.cpu  # noqa: F401  (stand-ins, before Megatron)

import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from moonlight import parallel
from moonlight.config import Run
from moonlight.model.build import build_model


@contextlib.contextmanager
def dry_run(run: Run, world_size: int, rank: int) -> Iterator[list[GPTModel]]:
    """This rank's model chunks in a world of `world_size`. Whatever is made of them inside has no memory either.

    What needs values (a forward pass that sends tokens to experts, a norm) raises an error of torch's.

    Raises:
        UserError: the layout does not divide the world.
    """
    assert not dist.is_initialized(), "a world exists already"
    run.parallel.data_parallel_size(world_size)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel.build_groups(run.parallel, run.train.seed)
        with FakeTensorMode():
            yield build_model(run)
    finally:
        parallel.leave_world()
