"""What is said when memory runs out: the settings that need less of it, with their present values."""

import contextlib
import errno
from collections.abc import Iterator

import torch

from moonlight.config.run import RunConfig
from moonlight.errors import UserError

_SAID_BY_ALLOCATORS = ("can't allocate memory", "not enough memory", "std::bad_alloc", "Cannot allocate memory")


@contextlib.contextmanager
def explain_oom(config: RunConfig) -> Iterator[None]:
    """Turn an error of running out of memory, of the GPU or of the machine, into a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not _is_of_memory(error):
            raise
        kind = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        parallel, optimizer_config = config.parallel, config.optimizer
        raise UserError(
            f"out of {kind}: a smaller train.micro_batch_size ({config.train.micro_batch_size}) or "
            "data.sequence_length "
            f"({config.data.sequence_length}) needs less for activations, and so does train.recompute_modules ("
            f"{list(config.train.recompute_modules)}); more parallel.expert_parallel_size "
            f"({parallel.expert_parallel_size}), parallel.tensor_parallel_size ({parallel.tensor_parallel_size}) or "
            f"parallel.pipeline_parallel_size ({parallel.pipeline_parallel_size}), train.dtype ({config.train.dtype}) "
            f"bfloat16, optimizer.momentum_dtype ({optimizer_config.momentum_dtype}) bfloat16 or "
            "optimizer.master_weights "
            f"({optimizer_config.master_weights}) split less for the model, and "
            f"train.async_save ({config.train.async_save}) false less of the host's"
        ) from error


def _is_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return any(words in str(error) for words in _SAID_BY_ALLOCATORS)
