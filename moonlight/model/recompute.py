"""Selective recomputation: free activations and recompute them for the backward pass (arXiv 2205.05198, 5).

The operations that produce the activations run once under autograd. Only their outputs are freed, and recomputed for
the operations that consume them. Side effects of the forward pass (token counts of the router, maxima of the logits)
therefore happen once.
"""

from collections.abc import Callable, Sequence

import torch


def recompute_in_backward(
    tensors: Sequence[torch.Tensor], recompute: Callable[[], Sequence[torch.Tensor]], result: torch.Tensor
) -> None:
    """Free the memory of `tensors`; when the gradient of `result` is ready, refill them with `recompute()`.

    Only operations between `tensors` and `result` may need `tensors` in their backward pass. `recompute` must return
    bit-identical values in the same memory layout, and may reference only tensors that stay in memory anyway. Does
    nothing if `result` requires no gradient.
    """
    if not result.requires_grad:
        return
    freed = [tensor.detach() for tensor in tensors]
    for tensor in freed:
        tensor.untyped_storage().resize_(0)
    pending = [(freed, recompute)]

    def refill(_: torch.Tensor) -> None:
        # Pop, because a hook lives as long as the graph: its references would last for the entire backward pass.
        tensors, recompute = pending.pop()
        with torch.no_grad():
            for tensor, recomputed in zip(tensors, recompute(), strict=True):
                storage, values = tensor.untyped_storage(), recomputed.untyped_storage()
                storage.resize_(values.nbytes())
                storage.copy_(values, non_blocking=True)

    result.register_hook(refill)
