"""Fixes for Megatron-Core 0.16.1, so that it runs without CUDA and without Transformer Engine.

Importing this module installs the fixes, so it must come before any `megatron` import. With CUDA, only the log and
warning filters and `replace_te_linear` act. Each fix states what the installed versions (megatron-core 0.16.1,
torch 2.13.0) do without it, and when it can be deleted. Check these conditions at every upgrade.
"""

import contextlib
import logging
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

_HAS_CUDA = torch.cuda.is_available()


class _Stream:
    """Stream and event of a device without streams: all work is already complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record_event(self, event: Any = None) -> "_Stream":
        return self

    def synchronize(self, stream: Any = None) -> None: ...

    wait = wait_event = wait_stream = record = synchronize


_ONLY_STREAM = _Stream()


def _install_device_functions() -> None:
    """Redirect the torch.cuda functions that Megatron calls to the CPU.

    Without this, Megatron 0.16.1 fails without CUDA: for example, `tensor_parallel/mappings.py` allocates on
    `torch.cuda.current_device()`, and `tensor_parallel/random.py` seeds with `torch.cuda.manual_seed`. The random
    state becomes that of the CPU generator. Device properties are not faked, because Inductor would use them.

    Delete when Megatron builds, runs and seeds a model without calling torch.cuda on a machine without CUDA, and
    moonlight's own calls of `torch.cuda.current_device` are replaced.
    """
    cpu = torch.device("cpu")
    replacements: dict[str, Any] = {
        "current_device": lambda: cpu,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: _ONLY_STREAM,
        "default_stream": lambda device=None: _ONLY_STREAM,
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Stream,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state = replacements["get_rng_state"]
    torch.cuda.random.set_rng_state = replacements["set_rng_state"]


@contextlib.contextmanager
def _replace(module: types.ModuleType, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextlib.contextmanager
def override_current_device(device: torch.device) -> Iterator[None]:
    """Make `torch.cuda.current_device` return `device`, so that Megatron builds on it; with CUDA too.

    Megatron 0.16.1 allocates parameters on `torch.cuda.current_device()`, so it ignores `torch.device` contexts. Delete
    when its layers and buffers follow the default device of torch.
    """
    with _replace(torch.cuda, "current_device", lambda: device):
        yield


class _TorchOnCpu(types.ModuleType):
    """The torch module for use inside a Megatron module: factories with `device="cuda"` allocate on the CPU."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name not in ("zeros", "ones", "empty", "tensor"):
            return value

        def factory(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("device") == "cuda":
                kwargs["device"] = "cpu"
            return value(*args, **kwargs)

        return factory


def _gather_uneven(tensor: torch.Tensor, sizes: list[int], group: Any) -> torch.Tensor:
    """Gather all ranks' rows, `sizes[rank]` of each, with an all-to-all in which each rank sends its rows to all.

    Megatron 0.16.1 passes tensors of different sizes to `torch.distributed.all_gather`. Gloo in torch 2.13 rejects
    them ("invalid tensor size"). Delete when gloo accepts them.
    """
    output = tensor.new_empty(sum(sizes), *tensor.shape[1:])
    copies = tensor.repeat(group.size(), *[1] * (tensor.dim() - 1))
    dist.all_to_all_single(output, copies, sizes, [len(tensor)] * group.size(), group=group)
    return output


def _reduce_scatter_uneven(tensor: torch.Tensor, sizes: list[int], group: Any) -> torch.Tensor:
    """Return this rank's rows, `sizes[rank]` of each rank, summed over the ranks in rank order.

    Megatron 0.16.1 passes tensors of different sizes to `torch.distributed.reduce_scatter`. Gloo in torch 2.13 accepts
    them, checked in float32 only. Delete when all tests of layouts pass without this function.
    """
    num_rows = sizes[group.rank()]
    received = tensor.new_empty(num_rows * group.size(), *tensor.shape[1:])
    dist.all_to_all_single(received, tensor.contiguous(), [num_rows] * group.size(), sizes, group=group)
    return received.view(group.size(), num_rows, *tensor.shape[1:]).sum(0)


def _uncompiled(function: Any = None, **options: Any) -> Any:
    """Return the function unchanged; callable like torch.compile, with or without options."""
    return _uncompiled if function is None else function


def _install_in_megatron() -> None:
    """Patch the Megatron modules themselves; only `torch.compile` is restored afterwards."""
    # Megatron 0.16.1 sets jit_fuser = torch.compile and decorates functions during `import megatron.core`, for example
    # in fusions/fused_bias_geglu.py. The first decoration imports Inductor, which takes longer than importing Megatron,
    # and compiling takes minutes on a CPU for no gain. Delete when `import megatron.core` does not call torch.compile.
    # Modules that copy torch.compile keep `_uncompiled`.
    with contextlib.nullcontext() if _HAS_CUDA else _replace(torch, "compile", _uncompiled):
        import megatron.core.jit  # noqa: F401
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if _HAS_CUDA:
        return
    # pipeline_parallel/schedules.py of 0.16.1 allocates its token count with torch.zeros(..., device="cuda"). Delete
    # when the file contains no literal device="cuda".
    schedules.torch = _TorchOnCpu("torch")
    # tensor_parallel/random.py of 0.16.1 sets the state of torch.cuda.default_generators in a lazy call, which never
    # runs without CUDA; with graph_safe, its getter initializes CUDA. Delete when both functions use the CPU generator
    # on a machine without CUDA.
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()

    # Gloo's all-to-all needs its split sizes as numbers. maybe_move_tensor_to_cpu of 0.16.1 ignores as_numpy for a
    # tensor that is already on the CPU. Delete when it returns a NumPy array for such a tensor.
    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    # See _gather_uneven and _reduce_scatter_uneven for when to delete these two.
    even_gather, even_reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(tensor: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return even_gather(tensor, group, output_split_sizes, use_global_buffer)
        return _gather_uneven(tensor, list(output_split_sizes), group)

    def reduce_scatter(tensor: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return even_reduce_scatter(tensor, group, input_split_sizes, use_global_buffer)
        return _reduce_scatter_uneven(tensor, list(input_split_sizes), group)

    mappings._gather_along_first_dim = gather
    mappings._reduce_scatter_along_first_dim = reduce_scatter
    moe_utils.maybe_move_tensor_to_cpu = to_cpu
    token_dispatcher.maybe_move_tensor_to_cpu = to_cpu


def replace_te_linear(replicated_linear: type[torch.nn.Module]) -> None:
    """Make Megatron's latent attention use this class as Transformer Engine's TELinear.

    Without Transformer Engine, `multi_latent_attention.py` of 0.16.1 still sets HAVE_TE to True: it imports
    `extensions/transformer_engine.py`, which replaces the missing package by a MagicMock. TELinear is then a MagicMock
    object, and `isinstance(linear_proj, TELinear)` raises TypeError.

    Megatron also builds down-projections replicated over tensor-parallel ranks only if their class is TELinear.
    Column-parallel ones lose the sum over those ranks in the gradient of the shared rope key.

    Delete when `multi_latent_attention.py` sets HAVE_TE only if Transformer Engine imports, and accepts replicated
    down-projections of another class.
    """
    from megatron.core.transformer import multi_latent_attention

    multi_latent_attention.TELinear = replicated_linear


def _install() -> None:
    if not _HAS_CUDA:
        _install_device_functions()
    # Megatron 0.16.1 logs and warns about every optional package that is missing; none is needed here. Delete when it
    # imports without these messages.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.")
    # Megatron 0.16.1 calls all_gather_into_tensor and reduce_scatter_tensor, which torch 2.13 deprecates. Delete when
    # it calls all_gather_single and reduce_scatter_single.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    _install_in_megatron()


_install()
