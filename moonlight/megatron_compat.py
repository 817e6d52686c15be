"""What Megatron-Core 0.16.1 needs to be imported and run without CUDA and without Transformer Engine.

Importing this module installs the stand-ins, so it comes before any `megatron` import. On a machine with CUDA only
the parts that concern a missing Transformer Engine act.
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
    """A stream or event of a device that has none: everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def record_event(self, event: Any = None) -> "_Stream":
        return self

    def synchronize(self) -> None: ...


_ONLY_STREAM = _Stream()


def _install_device_functions() -> None:
    """Point the torch.cuda functions that Megatron calls at the CPU.

    Random streams stay real: they are the CPU generator's. Device properties are not faked, because Inductor would
    believe them.
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
def override_current_device(device: torch.device) -> Iterator[None]:
    """Let Megatron, and all that asks like it, build on this device; with CUDA too."""
    before = torch.cuda.current_device
    torch.cuda.current_device = lambda: device  # type: ignore[assignment, return-value]
    try:
        yield
    finally:
        torch.cuda.current_device = before


class _TorchOnCpu(types.ModuleType):
    """The torch module as a Megatron module sees it, with a literal device "cuda" in factories meaning the CPU."""

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
    """All ranks' rows, `sizes` of each; gloo has no uneven all-gather, so every rank sends its rows to every other."""
    output = tensor.new_empty(sum(sizes), *tensor.shape[1:])
    copies = tensor.repeat(group.size(), *[1] * (tensor.dim() - 1))
    dist.all_to_all_single(output, copies, sizes, [len(tensor)] * group.size(), group=group)
    return output


def _reduce_scatter_uneven(tensor: torch.Tensor, sizes: list[int], group: Any) -> torch.Tensor:
    """This rank's rows, `sizes` of each rank, summed over the ranks in their order."""
    mine = sizes[group.rank()]
    received = tensor.new_empty(mine * group.size(), *tensor.shape[1:])
    dist.all_to_all_single(received, tensor.contiguous(), [mine] * group.size(), sizes, group=group)
    return received.view(group.size(), mine, *tensor.shape[1:]).sum(0)


def _uncompiled(function: Any = None, **options: Any) -> Any:
    """As torch.compile is called, with options or without; gives the function back."""
    return _uncompiled if function is None else function


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Whoever takes torch.compile meanwhile has a decorator that does nothing, for good."""
    before = torch.compile
    torch.compile = _uncompiled  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = before


def _install_in_megatron() -> None:
    """Mend the Megatron modules themselves. Every line names what version 0.16.1 does without it."""
    # Megatron's jit_fuser is torch.compile. Decorating the first function imports Inductor, which takes longer than all
    # of Megatron, and its builds would cost minutes on a CPU for no gain.
    with contextlib.nullcontext() if _HAS_CUDA else _nothing_compiled():
        import megatron.core.jit
    import megatron.core.tensor_parallel.random
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if _HAS_CUDA:
        return
    on_cpu = _TorchOnCpu("torch")
    schedules.torch = on_cpu
    megatron.core.tensor_parallel.random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: (
        torch.set_rng_state(new_state)
    )
    megatron.core.tensor_parallel.random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )

    # Gloo's all-to-all wants its split sizes as numbers; this function leaves CPU tensors alone.
    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    even_gather, even_reduce_scatter = (
        mappings._gather_along_first_dim,
        mappings._reduce_scatter_along_first_dim,
    )

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
    """Make Megatron's latent attention take this class for Transformer Engine's TELinear.

    Megatron 0.16.1 sets HAVE_TE by an import that succeeds without Transformer Engine, and then calls
    `isinstance(x, None)`. With the class, it also builds the down-projections replicated over tensor-parallel ranks;
    column-parallel ones lose the sum over those ranks in the gradient of the shared rope key.
    """
    from megatron.core.transformer import multi_latent_attention

    multi_latent_attention.TELinear = replicated_linear


def _install() -> None:
    if not _HAS_CUDA:
        _install_device_functions()
    # Megatron reports every optional package that is missing; none of them is needed here.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.")
    # Megatron calls collectives by names that torch is about to change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    _install_in_megatron()


_install()
