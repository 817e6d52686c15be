"""The parallel section of a recipe."""

import math
from dataclasses import dataclass

from moonlight.config.checks import NonNegative, Positive, check_fields, require, require_one_of


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How model and optimizer are sharded. The data-parallel size is the world size over tensor x pipeline."""

    num_processes: Positive[int] = 1
    """Local processes that `moonlight pretrain` starts. torchrun has its own setting."""
    tensor_parallel_size: Positive[int] = 1
    """Ranks that share each attention and MLP matrix. More than 1 turns sequence parallelism on, which Megatron's
    mixture of experts needs."""
    pipeline_parallel_size: Positive[int] = 1
    """Pipeline stages."""
    virtual_pipeline_parallel_size: Positive[int] = 1
    """Model chunks per pipeline rank; more than 1 interleaves them."""
    expert_parallel_size: Positive[int] = 1
    """Ranks among which the experts of a layer are divided."""
    expert_tensor_parallel_size: Positive[int] = 1
    """Ranks that share each expert's matrices: 1, or tensor_parallel_size."""
    context_parallel_size: int = 1
    """Ranks that share a sequence. Only 1 is supported so far."""
    bucket_size: NonNegative[int] = 0
    """Gradient elements that data-parallel ranks exchange in one collective, during the backward pass. 0 chooses."""

    def __post_init__(self) -> None:
        check_fields("parallel", self)
        require(
            self.context_parallel_size == 1,
            f"parallel.context_parallel_size is {self.context_parallel_size}: only 1 is supported so far",
        )
        require_one_of(
            "parallel.expert_tensor_parallel_size",
            self.expert_tensor_parallel_size,
            tuple(dict.fromkeys((1, self.tensor_parallel_size))),
        )
        require(
            self.virtual_pipeline_parallel_size == 1 or self.pipeline_parallel_size > 1,
            f"parallel.virtual_pipeline_parallel_size is {self.virtual_pipeline_parallel_size}: more than 1 needs "
            "parallel.pipeline_parallel_size above 1",
        )

    def data_parallel_size(self, world_size: int) -> int:
        """Return the data-parallel size on `world_size` processes.

        Raises:
            UserError: the layout does not divide the processes.
        """
        for name in (
            "tensor_parallel_size x pipeline_parallel_size",
            "expert_tensor_parallel_size x expert_parallel_size x pipeline_parallel_size",
        ):
            size = math.prod(getattr(self, key) for key in name.split(" x "))
            require(world_size % size == 0, f"the world has {world_size} processes: {name} = {size} does not divide it")
        return world_size // (self.tensor_parallel_size * self.pipeline_parallel_size)
