"""Data parallelism with owners: gradients leave during the backward pass, weights return during the next forward pass.

Replaces Megatron's DistributedDataParallel, whose equal shards would cut matrices or pad them. Megatron's schedules
call the same hooks: `no_sync_func` while micro-batches accumulate, `finalize_model_grads_func` at the end.
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
    """The parameters of this rank's model chunks, who owns which rows of them, and their exchange.

    Gradient sums are in `parameter.main_grad`; after `finish_grad_sync` every owner has the world's sums of its rows in
    its buckets: float32, but for a rank that is alone and has them where they are.
    """

    def __init__(
        self,
        model_chunks: Sequence[GPTModel],
        rules: tuple[ParamGroupRule, ...],
        bucket_size: int,
        gradient_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Args:
        bucket_size: elements that close a bucket; 0 leaves it to `place`.
        gradient_dtype: of gradient sums, and of what travels to owners.
        """
        state = collect_sharded_tensors(model_chunks)
        self.parameters = collect_params(state, rules)
        trained = {parameter.key for parameter in self.parameters}
        self.buffers: dict[str, ShardedParam] = {key: value for key, value in state.items() if key not in trained}
        for parameter in self.parameters:
            model = parameter.torch_param
            model.main_grad = torch.zeros_like(model, dtype=gradient_dtype)  # type: ignore[attr-defined]
        self.bucket_groups: list[BucketGroup] = []
        self._lane_of: dict[torch.nn.Parameter, BucketGroup] = {}
        for expert in (False, True):
            group = data_parallel_group(expert)
            own = [parameter for parameter in self.parameters if parameter.is_expert == expert]
            placed = place_params([parameter.spec for parameter in own], group.size(), bucket_size)
            lane = BucketGroup(
                [
                    Bucket([self.parameters[o.index] for o in bucket_params], fragments, group)
                    for bucket_params, fragments in placed
                ]
            )
            self.bucket_groups.append(lane)
            self._lane_of |= {parameter.torch_param: lane for parameter in own}
        self._last_micro_batch = True
        self._hook(model_chunks)
        transformer_config = model_chunks[0].config
        transformer_config.no_sync_func = self.no_sync
        transformer_config.finalize_model_grads_func = self._finalize

    def zero_grad_buffer(self) -> None:
        """Before a backward pass: gradient sums start from zero."""
        torch._foreach_zero_([p.torch_param.main_grad for p in self.parameters])  # type: ignore[attr-defined]
        for lane in self.bucket_groups:
            lane.start_backward()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients only add up: another micro-batch follows."""
        self._last_micro_batch = False
        try:
            yield
        finally:
            self._last_micro_batch = True

    def finish_grad_sync(self) -> None:
        """Wait until this rank's own rows hold the sums over the world."""
        for lane in self.bucket_groups:
            lane.finish_grad_sync()
        replicated = [gradient for parameter, _, gradient in self.owned_shards() if parameter.tp_mode == "replicated"]
        # Under sequence parallelism each rank saw its part of the sequence; peers own the same rows.
        if replicated:
            flat = torch.cat([gradient.flatten() for gradient in replicated]).float()
            dist.all_reduce(flat, group=tensor_parallel_group(expert=False))
            parts = flat.split([gradient.numel() for gradient in replicated])
            torch._foreach_copy_(replicated, [p.view_as(g) for p, g in zip(parts, replicated, strict=True)])
        for parameter, _, gradient in self.owned_shards():
            if parameter.is_shared_embedding:  # its peer on the other stage owns the same rows
                exact = gradient.float()  # itself, if it is
                dist.all_reduce(exact, group=embedding_group())
                gradient.copy_(exact)

    def start_param_sync(self) -> None:
        """The owners have changed their rows in the model: send them to everyone, waited for when a module needs
        them."""
        for lane in self.bucket_groups:
            lane.start_param_sync()

    def finish_param_sync(self) -> None:
        """Wait until the whole model is up to date; for whoever reads it without running it."""
        for lane in self.bucket_groups:
            lane.finish_param_sync()

    def owned_shards(self) -> Iterator[tuple[LocalParam, RowShard, torch.Tensor]]:
        """What this rank owns: parameter, rows, and where their gradient sum appears, [rows, columns]."""
        for lane in self.bucket_groups:
            for bucket in lane.buckets:
                for fragment, gradient in zip(bucket.owned_shards, bucket.gradients, strict=True):
                    yield self.parameters[fragment.param_index], fragment, gradient

    def _hook(self, model_chunks: Sequence[GPTModel]) -> None:
        # Hooks live in C++ with the parameters, out of the garbage collector's sight: they must keep nothing alive.
        this = weakref.ref(self)

        def gradient_is_there(param: torch.Tensor) -> None:
            self = this()
            if self is None or param.grad is None:
                return
            add_(param.main_grad, param.grad)  # type: ignore[attr-defined]
            param.grad = None
            if self._last_micro_batch:
                self._lane_of[param].register_grad_ready(param)  # type: ignore[index, arg-type]

        def weights_are_needed(module: torch.nn.Module, inputs: Any) -> None:
            self = this()
            if self is not None:
                for model in module.parameters(recurse=False):
                    if model in self._lane_of:
                        self._lane_of[model].wait_for_param(model)

        for parameter in self.parameters:
            parameter.torch_param.register_post_accumulate_grad_hook(gradient_is_there)
        for chunk in model_chunks:
            for module in chunk.modules():
                if any(True for _ in module.parameters(recurse=False)):
                    module.register_forward_pre_hook(weights_are_needed)

    def _finalize(self, models: Any, num_tokens: Any = None, **_: Any) -> None:
        """Called by Megatron's schedules after the last backward pass. Losses are divided by the token count
        already."""
        self.finish_grad_sync()
