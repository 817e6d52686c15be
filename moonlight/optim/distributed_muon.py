"""Distributed Muon: Muon and AdamW for the rows that this rank owns (arXiv 2502.16982, 2.2).

Muon orthogonalizes a full matrix, but ZeRO-1's equal shards split matrices. Here, each matrix has one owner rank in
its data-parallel group instead, which holds its momentum and master weights. (The paper keeps ZeRO-1's shards, and
every rank with a shard gathers the full matrix.) One step, on each rank:

1. `ShardedDataParallel` has already summed the gradients of the rows that this rank owns.
2. Momentum. Update the momentum and compute the direction to orthogonalize, in batches of bounded size.
3. Newton-Schulz. Most matrices are complete on their owner rank, and are orthogonalized there (`_muon_batches`). The
   others are split over several owner ranks or by tensor parallelism. One rank gathers each of them, orthogonalizes it
   and scatters the result (`_split_matrices`, see matrix_exchange.py).
4. Update. Scale the result to the RMS of AdamW's updates, apply it with weight decay to the master weights, and round
   them into the model.
5. AdamW's rows (embedding, head, norms) skip steps 2 and 3 (`_adamw_batches`).
6. `ShardedDataParallel` sends the new rows to all other ranks during the next forward pass.

docs/distributed_muon.md describes the same with a diagram and counted bytes.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from moonlight.config.optimizer import OptimizerConfig
from moonlight.config.run import RunConfig
from moonlight.dist_checkpoint.chunks import LocalChunks
from moonlight.kernels.blocks import row_blocks
from moonlight.model.build import DTYPES
from moonlight.model.shards import local_chunks, local_shards, to_hf_axes
from moonlight.optim.data_parallel import ShardedDataParallel
from moonlight.optim.master_weights import MasterWeight, apply_update
from moonlight.optim.matrix_exchange import SplitMatrices
from moonlight.optim.newton_schulz import WORKSPACE_ELEMENTS, orthogonalize_all
from moonlight.optim.parameters import OwnedShard, TensorChunk
from moonlight.optim.update_rules import (
    adamw_updates,
    batch_by_elements,
    normalize_rms_,
    rms_match_scale,
    update_momentum,
    update_momentum_norms,
)
from moonlight.placement.param_groups import MONITOR_GROUPS, param_group_rules

MOMENTA = {"muon": ("momentum",), "adamw": ("exp_avg", "exp_avg_sq")}
"""Names of the optimizer states of each algorithm, in checkpoints."""


class DistributedMuon:
    """Optimizer of a run. Updates the rows that this rank owns, and starts to send them to the other ranks.

    `owned` holds these rows with their state, in the order of `ShardedDataParallel.owned_shards`.
    """

    def __init__(self, data_parallel: ShardedDataParallel, optimizer_config: OptimizerConfig, hidden_size: int) -> None:
        """`hidden_size`: of the model; used if `optimizer.rms_matching` is baseline."""
        self.data_parallel, self.optimizer_config, self._hidden_size = data_parallel, optimizer_config, hidden_size
        self.owned: list[OwnedShard] = []
        muon_dtype = DTYPES[optimizer_config.momentum_dtype]
        for parameter, shard, grad in data_parallel.owned_shards():
            master = MasterWeight(parameter.weight_2d[shard.start : shard.stop], optimizer_config.master_weights)
            algorithm = parameter.rule.algorithm
            dtype = muon_dtype if algorithm == "muon" else torch.float32
            states = [torch.zeros_like(grad, dtype=dtype) for _ in MOMENTA[algorithm]]
            self.owned.append(OwnedShard(parameter, shard, grad, master, states))
        adamw = [owned for owned in self.owned if owned.param.rule.algorithm == "adamw"]
        muon = [owned for owned in self.owned if owned.param.rule.algorithm == "muon"]
        self._adamw_batches = list(_batches(adamw))
        self._muon_batches = list(_batches([owned for owned in muon if owned.is_complete]))
        self._newton_schulz_dtype = DTYPES[optimizer_config.newton_schulz_dtype]
        incomplete = [owned for owned in muon if not owned.is_complete]
        self._split_matrices = [
            SplitMatrices(bucket_group, data_parallel.parameters, incomplete, self._newton_schulz_dtype)
            for bucket_group in data_parallel.bucket_groups
            if bucket_group.buckets
        ]

    def master_state_dict(self) -> dict[str, LocalChunks]:
        """Return this rank's rows of the float32 master weights, and router biases, by checkpoint name."""
        return self._master_chunks([owned.master_weight.to_float32() for owned in self.owned])

    def optimizer_state_dict(self) -> dict[str, LocalChunks]:
        """Return this rank's rows of the optimizer states, by `optimizer.<state>.<parameter>`."""
        return owned_chunks(
            (f"optimizer.{name}.{owned.param.key}", owned, state)
            for owned in self.owned
            for name, state in zip(MOMENTA[owned.param.rule.algorithm], owned.states, strict=True)
        )

    def iter_state_dicts(self) -> Iterator[dict[str, LocalChunks]]:
        """Yield `master_state_dict` and `optimizer_state_dict` in parts.

        Float32 values of split masters exist for one part at a time.
        """
        for owned in self.owned:
            yield owned_chunks([(owned.param.key, owned, owned.master_weight.to_float32())])
        yield self._buffer_chunks() | self.optimizer_state_dict()

    def state_dict_metadata(self) -> dict[str, LocalChunks]:
        """Return `master_state_dict` and `optimizer_state_dict` for their names, shapes and dtypes.

        Split masters are meta tensors.
        """
        return (
            self._master_chunks([owned.master_weight.to_meta() for owned in self.owned]) | self.optimizer_state_dict()
        )

    @contextlib.contextmanager
    def loading_masters(self) -> Iterator[dict[str, LocalChunks]]:
        """Yield `master_state_dict` to load into; on exit, store the values and round them into all ranks' models.

        Split masters are in host memory meanwhile, because float32 values of all of them may not fit on the GPU.
        """
        values = [owned.master_weight.to_float32_on_host() for owned in self.owned]
        yield self._master_chunks(values)
        with torch.no_grad():
            for owned, value in zip(self.owned, values, strict=True):
                owned.master_weight.write(value)
        self.data_parallel.start_param_sync()
        self.data_parallel.finish_param_sync()

    def state_bytes(self) -> int:
        """Return the bytes of master weights and optimizer states on this rank, without the model's weights."""
        states = sum(state.numel() * state.element_size() for owned in self.owned for state in owned.states)
        return states + sum(owned.master_weight.state_bytes() for owned in self.owned)

    @torch.no_grad()
    def gradient_norms(self) -> dict[str, float]:
        """Return the gradient's norm over all ranks for each of MONITOR_GROUPS. Collective.

        Exactly one rank counts each element.
        """
        sums = _zero_group_sums()
        grads = [owned.grad for owned in self.owned]
        _add_to_group_sums(sums, self.owned, grads, [1.0] * len(self.owned), torch.float64)
        dist.all_reduce(sums)
        return {name: square**0.5 for name, (square, count) in zip(MONITOR_GROUPS, sums.tolist(), strict=True) if count}

    @torch.no_grad()
    def weight_sums(self) -> torch.Tensor:
        """Return of this rank's master weights what `step` returns of the update."""
        sums = _zero_group_sums()
        for owned in self.owned:
            _add_to_group_sums(sums, [owned], [owned.master_weight.to_float32()], [1.0])
        return sums

    @torch.no_grad()
    def step(
        self,
        *,
        learning_rate: float,
        weight_decay: float,
        step: int,
        gradient_norm: float,
        row_factors: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Update this rank's rows from their gradients, clipped to `optimizer.clip_grad_norm`. Collective.

        Starts `ShardedDataParallel.start_param_sync` before it returns.

        Args:
            step: counted from 1; AdamW's bias correction depends on it.
            gradient_norm: of all gradients, over all ranks.
            row_factors: factors that multiply rows after the update (QK-Clip): parameter name to float32 [rows] of
                this rank. They are equal on all ranks that own rows of the parameter.

        Returns:
            For each of MONITOR_GROUPS, the sum of squares and the number of the update's elements, for its RMS:
            float64 [groups, 2]. Exactly one rank counts each element.
        """
        limit = self.optimizer_config.clip_grad_norm
        scale = limit / (gradient_norm + 1e-6) if 0 < limit < gradient_norm else 1.0
        sums = _zero_group_sums()

        def apply(shards: Sequence[OwnedShard], updates: Sequence[torch.Tensor], factors: Sequence[float]) -> None:
            for use_decay in (True, False):
                selected = [
                    (owned.master_weight, update, factor)
                    for owned, update, factor in zip(shards, updates, factors, strict=True)
                    if owned.param.rule.use_weight_decay == use_decay
                ]
                if selected:
                    decay = weight_decay if use_decay else 0.0
                    apply_update(*zip(*selected, strict=True), learning_rate=learning_rate, weight_decay=decay)
            _add_to_group_sums(sums, shards, updates, factors)

        for batch in self._muon_batches:
            apply(batch, *self._scale_updates(batch, self._orthogonalize_complete(batch, scale)))
        for split in self._split_matrices:
            results = split.orthogonalize_shards(self._directions(split.shards, scale), self._orthogonalize)
            apply(split.shards, *self._scale_updates(split.shards, results))
            del results
        for batch in self._adamw_batches:
            apply(batch, self._adamw_updates(batch, step, scale), [1.0] * len(batch))
        self._scale_rows(row_factors or {})
        self.data_parallel.start_param_sync()
        return sums

    def _scale_rows(self, row_factors: dict[str, torch.Tensor]) -> None:
        """Multiply rows of the master weights, and round them into the model."""
        assert row_factors.keys() <= {parameter.key for parameter in self.data_parallel.parameters}, list(row_factors)
        for owned in self.owned:
            if (factors := row_factors.get(owned.param.key)) is not None:
                assert factors.shape == (owned.param.rows,), (owned.param.key, factors.shape)
                values = owned.master_weight.to_float32()
                values.mul_(factors[owned.shard.start : owned.shard.stop].unsqueeze(-1))
                owned.master_weight.write(values)

    def _master_chunks(self, values: Sequence[torch.Tensor]) -> dict[str, LocalChunks]:
        masters = owned_chunks((o.param.key, o, value) for o, value in zip(self.owned, values, strict=True))
        return masters | self._buffer_chunks()

    def _buffer_chunks(self) -> dict[str, LocalChunks]:
        return {key: local_chunks(buffer) for key, buffer in self.data_parallel.buffers.items()}

    def _directions(self, shards: Sequence[OwnedShard], scale: float) -> list[torch.Tensor]:
        """Update the momentum of the shards; return the directions to orthogonalize, float32."""
        grads, momenta = [owned.grad for owned in shards], [owned.states[0] for owned in shards]
        optimizer_config = self.optimizer_config
        return update_momentum(
            grads, momenta, momentum=optimizer_config.momentum, nesterov=optimizer_config.nesterov, scale=scale
        )

    def _orthogonalize_complete(self, batch: Sequence[OwnedShard], scale: float) -> list[torch.Tensor]:
        """Update the momentum of a batch of complete matrices and orthogonalize them.

        The directions are freed on return.
        """
        optimizer_config = self.optimizer_config
        directions, norms = update_momentum_norms(
            [owned.grad for owned in batch],
            [owned.states[0] for owned in batch],
            [math.prod(owned.full_matrix_shape) for owned in batch],
            momentum=optimizer_config.momentum,
            nesterov=optimizer_config.nesterov,
            scale=scale,
        )
        matrices = [
            direction.view(-1, *owned.full_matrix_shape) for owned, direction in zip(batch, directions, strict=True)
        ]
        return self._orthogonalize(matrices, norms)

    def _adamw_updates(self, batch: Sequence[OwnedShard], step: int, scale: float) -> list[torch.Tensor]:
        optimizer_config = self.optimizer_config
        return adamw_updates(
            [owned.grad.float() for owned in batch],
            [owned.states[0] for owned in batch],
            [owned.states[1] for owned in batch],
            beta1=optimizer_config.adamw_beta1,
            beta2=optimizer_config.adamw_beta2,
            eps=optimizer_config.adamw_eps,
            step=step,
            scale=scale,
        )

    def _orthogonalize(
        self, matrices: Sequence[torch.Tensor], norms: Sequence[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Orthogonalize full matrices [..., rows, columns]. Any step that needs a full matrix belongs here."""
        optimizer_config = self.optimizer_config
        results = orthogonalize_all(
            matrices,
            optimizer_config.num_newton_schulz_steps,
            optimizer_config.coefficients,
            self._newton_schulz_dtype,
            norms,
        )
        return normalize_rms_(results) if optimizer_config.rms_matching == "update_norm" else results

    def _scale_updates(
        self, shards: Sequence[OwnedShard], results: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[float]]:
        """Return orthogonal matrices as updates [rows, columns], and the factors that match the RMS of AdamW's updates.

        On a GPU, updates keep their dtype and `apply_update` multiplies by the factors. On a CPU, updates are float32
        and already multiplied, and the factors are 1.
        """
        updates = [result.reshape(owned.grad.shape) for owned, result in zip(shards, results, strict=True)]
        rms, matching = self.optimizer_config.rms_match, self.optimizer_config.rms_matching
        factors = [rms_match_scale(*owned.full_matrix_shape, rms, matching, self._hidden_size) for owned in shards]
        if shards and shards[0].grad.device.type != "cpu":
            return updates, factors
        return [u.float() * factor for u, factor in zip(updates, factors, strict=True)], [1.0] * len(shards)


def _zero_group_sums() -> torch.Tensor:
    """Return zeros for the sum of squares and the number of elements of each of MONITOR_GROUPS, float64 [groups, 2]."""
    return torch.zeros(len(MONITOR_GROUPS), 2, dtype=torch.float64, device=torch.cuda.current_device())


def _add_to_group_sums(
    sums: torch.Tensor,
    shards: Sequence[OwnedShard],
    values: Sequence[torch.Tensor],
    factors: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Add factor * values to `sums` [groups, 2], in place. Only the primary copy of a shard counts.

    `dtype`: in which norms are computed.
    """
    by_group: dict[int, list[tuple[torch.Tensor, float]]] = {}
    for owned, value, factor in zip(shards, values, factors, strict=True):
        if owned.is_primary_copy:
            by_group.setdefault(MONITOR_GROUPS.index(owned.param.monitor_group), []).append((value, factor))
    for group, counted in by_group.items():
        parts = [(part, factor) for value, factor in counted for part in _parts_for(value, dtype)]
        norms = torch._foreach_norm([part for part, _ in parts], dtype=dtype)
        norms = torch._foreach_mul(norms, [factor for _, factor in parts])
        sums[group, 0] += torch.stack(norms).double().square().sum()
        sums[group, 1] += sum(value.numel() for value, _ in counted)


def _parts_for(value: torch.Tensor, dtype: torch.dtype) -> Sequence[torch.Tensor]:
    """Split `value` by rows for a norm in `dtype`: on a CPU, torch copies its input to that dtype first."""
    if value.is_cuda or value.dtype == dtype or not value.dim():
        return [value]
    return [value[rows] for rows in row_blocks(len(value), value[:1].numel())]


def owned_chunks(values: Iterable[tuple[str, OwnedShard, torch.Tensor]]) -> dict[str, LocalChunks]:
    """Return chunks of global tensors by name, from (name, owned rows, tensor of these rows)."""
    shapes: dict[str, tuple[int, ...]] = {}
    chunks: dict[str, list[TensorChunk]] = {}
    for key, owned, tensor in values:
        shapes[key] = to_hf_axes(local_shards(owned.param.sharded_param)[0].global_shape)
        tensor_chunks = owned.param.tensor_chunks(owned.shard.start, owned.shard.stop, tensor)
        chunks.setdefault(key, []).extend(tensor_chunks)
    return {key: LocalChunks(shape, chunks[key]) for key, shape in shapes.items()}


def _batches(shards: Sequence[OwnedShard]) -> Iterator[list[OwnedShard]]:
    """Yield batches of full matrices (of rows for AdamW), sorted by shape, of at most WORKSPACE_ELEMENTS each."""
    limit = WORKSPACE_ELEMENTS[shards[0].grad.device.type] if shards else 0
    parts = [part for owned in shards for part in owned.split(limit)]
    return batch_by_elements(
        sorted(parts, key=lambda part: part.full_matrix_shape), lambda part: part.grad.numel(), limit
    )


def build_optimizer(model_chunks: Sequence[GPTModel], config: RunConfig) -> DistributedMuon:
    """Build the optimizer of a recipe for this rank's model chunks, with its data parallelism."""
    rules = param_group_rules(config.optimizer, config.model)
    dtype = DTYPES[config.optimizer.gradient_dtype]
    data_parallel = ShardedDataParallel(model_chunks, rules, config.parallel.bucket_size, dtype)
    return DistributedMuon(data_parallel, config.optimizer, config.model.hidden_size)
