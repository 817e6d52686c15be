"""Data parallelism with owner ranks, overlapped with computation.

`ShardedDataParallel` replaces Megatron's DistributedDataParallel, whose equal shards would split matrices or pad them.
For each parameter:

1. A hook adds every micro-batch gradient to `main_grad`.
2. On the last micro-batch, the hook marks the parameter as ready. The reduce-scatter of a bucket starts as soon as the
   backward pass has completed it, so it overlaps with the rest of the backward pass.
3. The optimizer updates the rows that this rank owns, then calls `start_param_sync`.
4. The all-gathers of the new weights run during the next forward pass. A hook on each module waits for its buckets.

Megatron's schedules call the same hooks as before: `no_sync_func` while micro-batches accumulate, and
`finalize_model_grads_func` after the last backward pass.
"""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from moonlight.kernels.blocks import add_
from moonlight.model.shards import ShardedParam, collect_sharded_tensors
from moonlight.optim.buckets import Bucket, BucketGroup
from moonlight.optim.parameters import (
    LocalParam,
    collect_params,
    data_parallel_group,
    embedding_group,
    tensor_parallel_group,
)
from moonlight.placement.owners import RowShard, place_params
from moonlight.placement.param_groups import ParamGroupRule


class ShardedDataParallel:
    """The parameters of this rank's model chunks, the owner ranks of their rows, and the exchange between ranks.

    This rank's gradient sums are in `torch_param.main_grad`. After `finish_grad_sync`, each owner rank has the sums
    over all ranks for its rows (`owned_shards`). They are float32; in a data-parallel group of one rank they are views
    of `main_grad`.

    `bucket_groups` holds one BucketGroup for dense parameters and one for experts: their data-parallel groups differ.
    """

    def __init__(
        self,
        model_chunks: Sequence[GPTModel],
        rules: tuple[ParamGroupRule, ...],
        bucket_size: int,
        gradient_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocate gradient sums, assign owner ranks and register the hooks.

        Args:
            rules: Muon or AdamW for each parameter, first match wins.
            bucket_size: number of elements that completes a bucket; 0: see `make_buckets`.
            gradient_dtype: dtype of `main_grad`, and of the gradients sent to owner ranks.
        """
        state = collect_sharded_tensors(model_chunks)
        self.parameters = collect_params(state, rules)
        trained = {parameter.key for parameter in self.parameters}
        self.buffers: dict[str, ShardedParam] = {key: value for key, value in state.items() if key not in trained}
        for parameter in self.parameters:
            torch_param = parameter.torch_param
            torch_param.main_grad = torch.zeros_like(torch_param, dtype=gradient_dtype)  # type: ignore[attr-defined]
        self.bucket_groups: list[BucketGroup] = []
        self._bucket_group_of: dict[torch.nn.Parameter, BucketGroup] = {}
        for is_expert in (False, True):
            group = data_parallel_group(is_expert)
            members = [parameter for parameter in self.parameters if parameter.is_expert == is_expert]
            placed = place_params([parameter.spec for parameter in members], group.size(), bucket_size)
            bucket_group = BucketGroup(
                [
                    Bucket([self.parameters[spec.index] for spec in bucket_params], shards, group)
                    for bucket_params, shards in placed
                ]
            )
            self.bucket_groups.append(bucket_group)
            self._bucket_group_of |= {parameter.torch_param: bucket_group for parameter in members}
        self._last_micro_batch = True
        self._register_hooks(model_chunks)
        transformer_config = model_chunks[0].config
        transformer_config.no_sync_func = self.no_sync
        transformer_config.finalize_model_grads_func = self._finalize

    def zero_grad_buffer(self) -> None:
        """Set all gradient sums to zero, before a backward pass."""
        torch._foreach_zero_([p.torch_param.main_grad for p in self.parameters])  # type: ignore[attr-defined]
        for bucket_group in self.bucket_groups:
            bucket_group.start_backward()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients without sending them: another micro-batch follows."""
        self._last_micro_batch = False
        try:
            yield
        finally:
            self._last_micro_batch = True

    def finish_grad_sync(self) -> None:
        """Wait until the rows that this rank owns hold the sums over all ranks. Collective."""
        for bucket_group in self.bucket_groups:
            bucket_group.finish_grad_sync()
        replicated = [grad for parameter, _, grad in self.owned_shards() if parameter.tp_mode == "replicated"]
        # Under sequence parallelism, each tensor-parallel rank processed one slice; peers own the same rows.
        if replicated:
            flat = torch.cat([grad.flatten() for grad in replicated]).float()
            dist.all_reduce(flat, group=tensor_parallel_group(expert=False))
            sums = flat.split([grad.numel() for grad in replicated])
            torch._foreach_copy_(replicated, [s.view_as(g) for s, g in zip(sums, replicated, strict=True)])
        for parameter, _, grad in self.owned_shards():
            if parameter.is_shared_embedding:  # the peer on the other pipeline stage owns the same rows
                total = grad.float()  # no copy if already float32
                dist.all_reduce(total, group=embedding_group())
                grad.copy_(total)

    def start_param_sync(self) -> None:
        """Start to send this rank's updated rows to all other ranks. A module waits for its weights when it runs."""
        for bucket_group in self.bucket_groups:
            bucket_group.start_param_sync()

    def finish_param_sync(self) -> None:
        """Wait until the full model is up to date. Call this before reading weights without a forward pass."""
        for bucket_group in self.bucket_groups:
            bucket_group.finish_param_sync()

    def owned_shards(self) -> Iterator[tuple[LocalParam, RowShard, torch.Tensor]]:
        """Yield each shard that this rank owns: parameter, rows, and the tensor [rows, columns] of its gradient sum."""
        for bucket_group in self.bucket_groups:
            for bucket in bucket_group.buckets:
                for shard, grad in zip(bucket.owned_shards, bucket.grads, strict=True):
                    yield self.parameters[shard.param_index], shard, grad

    def _register_hooks(self, model_chunks: Sequence[GPTModel]) -> None:
        # C++ stores hooks with the parameters, and the garbage collector cannot see them: they must hold no strong
        # references.
        weak_self = weakref.ref(self)

        def accumulate_grad(torch_param: torch.Tensor) -> None:
            self = weak_self()
            if self is None or torch_param.grad is None:
                return
            add_(torch_param.main_grad, torch_param.grad)  # type: ignore[attr-defined]
            torch_param.grad = None
            if self._last_micro_batch:
                self._bucket_group_of[torch_param].register_grad_ready(torch_param)  # type: ignore[index, arg-type]

        def wait_for_weights(module: torch.nn.Module, inputs: Any) -> None:
            self = weak_self()
            if self is not None:
                for torch_param in module.parameters(recurse=False):
                    if torch_param in self._bucket_group_of:
                        self._bucket_group_of[torch_param].wait_for_param(torch_param)

        for parameter in self.parameters:
            parameter.torch_param.register_post_accumulate_grad_hook(accumulate_grad)
        for chunk in model_chunks:
            for module in chunk.modules():
                if any(True for _ in module.parameters(recurse=False)):
                    module.register_forward_pre_hook(wait_for_weights)

    def _finalize(self, model_chunks: Any, num_tokens: Any = None, **_: Any) -> None:
        """Finish the gradient exchange. Megatron's schedules call this after the last backward pass.

        Losses are already divided by the token count.
        """
        self.finish_grad_sync()
