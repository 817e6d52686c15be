"""Explain out-of-memory errors: list the settings that reduce memory, with their current values."""

import contextlib
import errno
from collections.abc import Iterator

import torch

from moonlight.config.run import RunConfig
from moonlight.errors import UserError

_ALLOCATOR_MESSAGES = ("can't allocate memory", "not enough memory", "std::bad_alloc", "Cannot allocate memory")


@contextlib.contextmanager
def explain_oom(config: RunConfig) -> Iterator[None]:
    """Replace an out-of-memory error of the GPU or the host by a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not _is_out_of_memory(error):
            raise
        kind = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        parallel, optimizer_config = config.parallel, config.optimizer
        raise UserError(
            f"out of {kind}: a smaller train.micro_batch_size ({config.train.micro_batch_size}) or "
            f"data.sequence_length ({config.data.sequence_length}) needs less for activations, and so does "
            f"train.recompute_modules ({list(config.train.recompute_modules)}); more parallel.expert_parallel_size "
            f"({parallel.expert_parallel_size}), parallel.tensor_parallel_size ({parallel.tensor_parallel_size}) or "
            f"parallel.pipeline_parallel_size ({parallel.pipeline_parallel_size}), train.dtype ({config.train.dtype}) "
            f"bfloat16, optimizer.momentum_dtype ({optimizer_config.momentum_dtype}) bfloat16 or "
            f"optimizer.master_weights ({optimizer_config.master_weights}) split less for the model, and "
            f"train.async_save ({config.train.async_save}) false less host memory"
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return any(words in str(error) for words in _ALLOCATOR_MESSAGES)
