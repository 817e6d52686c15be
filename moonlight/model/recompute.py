"""Tensors that are made a second time for the backward pass instead of being kept (arXiv 2205.05198, 5).

The operations that made them run once, under autograd as always; only what they gave is let go, and made again for
the operations that took it. So nothing that a forward pass does besides (counts of the router, maxima of logits)
happens twice.
"""

from collections.abc import Callable, Sequence

import torch


def recompute_in_backward(
    tensors: Sequence[torch.Tensor], recompute: Callable[[], Sequence[torch.Tensor]], result: torch.Tensor
) -> None:
    """Free the memory of `tensors` until the gradient of `result` is there; `make()` then gives their values again.

    Whatever takes part in the way from `tensors` to `result`, and nothing else, may need them in its backward pass.
    `make` must give the same bits in the same layout of memory, and hold only what is kept anyhow. Without a gradient
    to come nothing happens.
    """
    if not result.requires_grad:
        return
    freed = [tensor.detach() for tensor in tensors]
    for tensor in freed:
        tensor.untyped_storage().resize_(0)
    waiting = [(freed, recompute)]

    def again(_: torch.Tensor) -> None:
        # Popped, because a hook lives as long as the graph: what it holds would stay for the whole backward pass.
        tensors, make = waiting.pop()
        with torch.no_grad():
            for tensor, made in zip(tensors, make(), strict=True):
                storage, values = tensor.untyped_storage(), made.untyped_storage()
                storage.resize_(values.nbytes())
                storage.copy_(values, non_blocking=True)

    result.register_hook(again)
