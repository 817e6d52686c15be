"""The optimizer of a run: Muon and AdamW over the rows that this rank owns (arXiv 2502.16982, 2.2; ours, its sharding).

Master weights and momenta live with their owner. Most matrices are whole where they are owned, and are updated there,
in batches of bounded size. A matrix cut by tensor parallelism, or over several owners because it is larger than a
mean share, is brought together by one rank (see exchange.py). docs/distributed_muon.md explains it with a drawing.
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
from moonlight.model.shards import local_chunks, local_shards, to_hf_axes
from moonlight.optim.data_parallel import ShardedDataParallel
from moonlight.optim.master_weights import MasterWeight, apply_update
from moonlight.optim.matrix_exchange import SplitMatrices
from moonlight.optim.newton_schulz import WORKSPACE_ELEMENTS, orthogonalize_all
from moonlight.optim.parameters import OwnedShard, TensorChunk
from moonlight.optim.update_rules import (
    adamw_updates,
    normalize_rms_,
    rms_match_scale,
    update_momentum,
    update_momentum_norms,
)
from moonlight.placement.param_groups import MONITOR_GROUPS, param_group_rules

MOMENTA = {"muon": ("momentum",), "adamw": ("exp_avg", "exp_avg_sq")}


class DistributedMuon:
    """Updates the rows that this rank owns, and sends them on their way to the others."""

    def __init__(self, data_parallel: ShardedDataParallel, optimizer_config: OptimizerConfig, hidden_size: int) -> None:
        """`hidden_size`: of the model, which one kind of `rms_matching` scales by."""
        self.data_parallel, self.optimizer_config, self._hidden_size = data_parallel, optimizer_config, hidden_size
        self.owned: list[OwnedShard] = []
        low = torch.bfloat16 if optimizer_config.momentum_dtype == "bfloat16" else torch.float32
        for parameter, fragment, gradient in data_parallel.owned_shards():
            master = MasterWeight(parameter.weight_2d[fragment.start : fragment.stop], optimizer_config.master_weights)
            algorithm = parameter.rule.algorithm
            dtype = low if algorithm == "muon" else torch.float32
            momenta = [torch.zeros_like(gradient, dtype=dtype) for _ in MOMENTA[algorithm]]
            self.owned.append(OwnedShard(parameter, fragment, gradient, master, momenta))
        adamw = [owned for owned in self.owned if owned.param.rule.algorithm == "adamw"]
        muon = [owned for owned in self.owned if owned.param.rule.algorithm == "muon"]
        self._adamw_batches = list(_batches(adamw))
        self._muon_batches = list(_batches([owned for owned in muon if owned.is_complete]))
        self._dtype = torch.bfloat16 if optimizer_config.newton_schulz_dtype == "bfloat16" else torch.float32
        shared = [owned for owned in muon if not owned.is_complete]
        self._gathered = [
            SplitMatrices(lane, data_parallel.parameters, shared, self._dtype)
            for lane in data_parallel.bucket_groups
            if lane.buckets
        ]

    def master_state_dict(self) -> dict[str, LocalChunks]:
        """This rank's rows of the float32 master weights, and router biases, under the names of the checkpoint."""
        return self._master_pieces([owned.master_weight.to_float32() for owned in self.owned])

    def optimizer_state_dict(self) -> dict[str, LocalChunks]:
        """This rank's rows of the momenta, under `optimizer.<momentum>.<parameter>`."""
        return _pieces(
            (f"optimizer.{name}.{owned.param.key}", owned, momentum)
            for owned in self.owned
            for name, momentum in zip(MOMENTA[owned.param.rule.algorithm], owned.states, strict=True)
        )

    def iter_state_dicts(self) -> Iterator[dict[str, LocalChunks]]:
        """`master_state` and `momentum_state` in parts: float32 of split masters is there for one part at a time."""
        for owned in self.owned:
            yield _pieces([(owned.param.key, owned, owned.master_weight.to_float32())])
        yield self._buffer_pieces() | self.optimizer_state_dict()

    def state_dict_metadata(self) -> dict[str, LocalChunks]:
        """`master_state` and `momentum_state` for their names, shapes and dtypes: split masters are meta tensors."""
        return (
            self._master_pieces([owned.master_weight.to_meta() for owned in self.owned]) | self.optimizer_state_dict()
        )

    def gradient_state(self) -> dict[str, LocalChunks]:
        """This rank's rows of the world's gradient sums, under the names of the parameters."""
        return _pieces((owned.param.key, owned, owned.gradient) for owned in self.owned)

    @contextlib.contextmanager
    def loading_masters(self) -> Iterator[dict[str, LocalChunks]]:
        """`master_state` to write into; what was written is then rounded into the model of every rank.

        Split masters are in host memory meanwhile: float32 of all is more than a GPU has room for.
        """
        values = [owned.master_weight.to_float32_on_host() for owned in self.owned]
        yield self._master_pieces(values)
        with torch.no_grad():
            for owned, value in zip(self.owned, values, strict=True):
                owned.master_weight.write(value)
        self.data_parallel.start_param_sync()
        self.data_parallel.finish_param_sync()

    def state_bytes(self) -> int:
        """Bytes of master weights and momenta on this rank, the model's own weights apart."""
        momenta = sum(m.numel() * m.element_size() for owned in self.owned for m in owned.states)
        return momenta + sum(owned.master_weight.state_bytes() for owned in self.owned)

    @torch.no_grad()
    def gradient_norms(self) -> dict[str, float]:
        """Norm of the world's gradient in each group of parameters: every element counted on exactly one rank."""
        sums = _group_sums()
        _add(sums, self.owned, [owned.gradient for owned in self.owned], [1.0] * len(self.owned), torch.float64)
        dist.all_reduce(sums)
        return {name: square**0.5 for name, (square, count) in zip(MONITOR_GROUPS, sums.tolist(), strict=True) if count}

    @torch.no_grad()
    def weight_sums(self) -> torch.Tensor:
        """Of this rank's master weights, what `step` returns of the update."""
        sums = _group_sums()
        for owned in self.owned:
            _add(sums, [owned], [owned.master_weight.to_float32()], [1.0])
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
        """Update this rank's rows from their gradients, clipped to `clip_grad_norm`; weights are then on their way.

        Args:
            step: counted from 1; AdamW's bias correction depends on it.
            row_factors: by what the rows of some parameters of this rank are multiplied after the update: the name of
                the parameter, and float32 [rows]. Equal on all owners of a parameter's rows.

        Returns:
            For each of GROUPS, the sum of squares and the count of the update's elements, for its RMS: [groups, 2]
            float64, every element counted on one rank.
        """
        optimizer_config = self.optimizer_config
        scale = (
            optimizer_config.clip_grad_norm / (gradient_norm + 1e-6)
            if 0 < optimizer_config.clip_grad_norm < gradient_norm
            else 1.0
        )
        sums = _group_sums()

        def apply(members: Sequence[OwnedShard], updates: Sequence[torch.Tensor], factors: Sequence[float]) -> None:
            for decays in (True, False):
                chosen = [
                    (owned.master_weight, update, factor)
                    for owned, update, factor in zip(members, updates, factors, strict=True)
                    if owned.param.rule.use_weight_decay == decays
                ]
                if chosen:
                    decay = weight_decay if decays else 0.0
                    apply_update(*zip(*chosen, strict=True), learning_rate=learning_rate, weight_decay=decay)
            _add(sums, members, updates, factors)

        for batch in self._muon_batches:
            apply(batch, *self._scaled(batch, self._orthogonal_directions(batch, scale)))
        for gathered in self._gathered:
            results = gathered.orthogonalize_shards(self._directions(gathered.shards, scale), self._orthogonalize)
            apply(gathered.shards, *self._scaled(gathered.shards, results))
            del results
        for batch in self._adamw_batches:
            apply(batch, self._adamw_updates(batch, step, scale), [1.0] * len(batch))
        self._scale_rows(row_factors or {})
        self.data_parallel.start_param_sync()
        return sums

    def _scale_rows(self, row_factors: dict[str, torch.Tensor]) -> None:
        assert row_factors.keys() <= {parameter.key for parameter in self.data_parallel.parameters}, list(row_factors)
        for owned in self.owned:
            if (factors := row_factors.get(owned.param.key)) is not None:
                assert factors.shape == (owned.param.rows,), (owned.param.key, factors.shape)
                values = owned.master_weight.to_float32()
                values.mul_(factors[owned.shard.start : owned.shard.stop].unsqueeze(-1))
                owned.master_weight.write(values)

    def _master_pieces(self, values: Sequence[torch.Tensor]) -> dict[str, LocalChunks]:
        masters = _pieces((o.param.key, o, value) for o, value in zip(self.owned, values, strict=True))
        return masters | self._buffer_pieces()

    def _buffer_pieces(self) -> dict[str, LocalChunks]:
        return {key: local_chunks(buffer) for key, buffer in self.data_parallel.buffers.items()}

    def _directions(self, members: Sequence[OwnedShard], scale: float) -> list[torch.Tensor]:
        gradients, momenta = [owned.gradient for owned in members], [owned.states[0] for owned in members]
        optimizer_config = self.optimizer_config
        return update_momentum(
            gradients, momenta, momentum=optimizer_config.momentum, nesterov=optimizer_config.nesterov, scale=scale
        )

    def _orthogonal_directions(self, members: Sequence[OwnedShard], scale: float) -> list[torch.Tensor]:
        """Of matrices that are whole here; their directions are gone when it returns."""
        optimizer_config = self.optimizer_config
        directions, norms = update_momentum_norms(
            [owned.gradient for owned in members],
            [owned.states[0] for owned in members],
            [math.prod(owned.full_matrix_shape) for owned in members],
            momentum=optimizer_config.momentum,
            nesterov=optimizer_config.nesterov,
            scale=scale,
        )
        whole = [
            direction.view(-1, *owned.full_matrix_shape) for owned, direction in zip(members, directions, strict=True)
        ]
        return self._orthogonalize(whole, norms)

    def _adamw_updates(self, members: Sequence[OwnedShard], step: int, scale: float) -> list[torch.Tensor]:
        optimizer_config = self.optimizer_config
        return adamw_updates(
            [owned.gradient.float() for owned in members],
            [owned.states[0] for owned in members],
            [owned.states[1] for owned in members],
            beta1=optimizer_config.adamw_beta1,
            beta2=optimizer_config.adamw_beta2,
            eps=optimizer_config.adamw_eps,
            step=step,
            scale=scale,
        )

    def _orthogonalize(
        self, matrices: Sequence[torch.Tensor], norms: Sequence[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Of whole matrices, wherever they were brought together: what is one matrix's alone is done here."""
        optimizer_config = self.optimizer_config
        results = orthogonalize_all(
            matrices, optimizer_config.num_newton_schulz_steps, optimizer_config.coefficients, self._dtype, norms
        )
        return normalize_rms_(results) if optimizer_config.rms_matching == "update_norm" else results

    def _scaled(
        self, members: Sequence[OwnedShard], results: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[float]]:
        """Orthogonal matrices as updates [rows, columns] and the factors that give them the RMS of AdamW's: still to be
        multiplied on a GPU, where updates stay in their dtype, and already in float32 on a CPU."""
        updates = [result.reshape(owned.gradient.shape) for owned, result in zip(members, results, strict=True)]
        rms, matching = self.optimizer_config.rms_match, self.optimizer_config.rms_matching
        factors = [rms_match_scale(*owned.full_matrix_shape, rms, matching, self._hidden_size) for owned in members]
        if members and members[0].gradient.device.type != "cpu":
            return updates, factors
        return [u.float() * factor for u, factor in zip(updates, factors, strict=True)], [1.0] * len(members)


def _group_sums() -> torch.Tensor:
    """Sum of squares and count of elements of each of GROUPS, still 0."""
    return torch.zeros(len(MONITOR_GROUPS), 2, dtype=torch.float64, device=torch.cuda.current_device())


def _add(
    sums: torch.Tensor,
    members: Sequence[OwnedShard],
    values: Sequence[torch.Tensor],
    factors: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Add factor * values of owned rows to the sums of their groups, every element of the world once.

    `dtype`: of the norms."""
    of_group: dict[int, list[tuple[torch.Tensor, float]]] = {}
    for owned, value, factor in zip(members, values, factors, strict=True):
        if owned.is_primary_copy:
            of_group.setdefault(MONITOR_GROUPS.index(owned.param.monitor_group), []).append((value, factor))
    for group, counted in of_group.items():
        parts = [(part, factor) for value, factor in counted for part in _parts_for(value, dtype)]
        norms = torch._foreach_norm([part for part, _ in parts], dtype=dtype)
        norms = torch._foreach_mul(norms, [factor for _, factor in parts])
        sums[group, 0] += torch.stack(norms).double().square().sum()
        sums[group, 1] += sum(value.numel() for value, _ in counted)


def _parts_for(value: torch.Tensor, dtype: torch.dtype) -> Sequence[torch.Tensor]:
    """Rows of `value` of which a CPU, where torch makes a copy in `dtype` for a norm, needs no large one."""
    if value.is_cuda or value.dtype == dtype or not value.dim():
        return [value]
    return [value[rows] for rows in row_blocks(len(value), value[:1].numel())]


def _pieces(values: Iterable[tuple[str, OwnedShard, torch.Tensor]]) -> dict[str, LocalChunks]:
    """Rectangles by name, of tensors that hold owned rows."""
    shapes: dict[str, tuple[int, ...]] = {}
    rectangles: dict[str, list[TensorChunk]] = {}
    for key, owned, tensor in values:
        shapes[key] = to_hf_axes(local_shards(owned.param.sharded_param)[0].global_shape)
        found = owned.param.tensor_chunks(owned.shard.start, owned.shard.stop, tensor)
        rectangles.setdefault(key, []).extend(found)
    return {key: LocalChunks(shape, rectangles[key]) for key, shape in shapes.items()}


def _batches(local: Sequence[OwnedShard]) -> Iterator[list[OwnedShard]]:
    """Runs of matrices, like shapes together, of at most WORKSPACE_ELEMENTS (or one matrix); of rows for AdamW."""
    limit = WORKSPACE_ELEMENTS[local[0].gradient.device.type] if local else 0
    parts = [part for owned in local for part in owned.split(limit)]
    batch: list[OwnedShard] = []
    elements = 0
    for part in sorted(parts, key=lambda part: part.full_matrix_shape):
        if batch and elements + part.gradient.numel() > limit:
            yield batch
            batch, elements = [], 0
        batch.append(part)
        elements += part.gradient.numel()
    if batch:
        yield batch


def build_optimizer(model_chunks: Sequence[GPTModel], config: RunConfig) -> DistributedMuon:
    """The optimizer that a recipe asks for, over this rank's model chunks."""
    rules = param_group_rules(config.optimizer, config.model)
    dtype = torch.bfloat16 if config.optimizer.gradient_dtype == "bfloat16" else torch.float32
    data_parallel = ShardedDataParallel(model_chunks, rules, config.parallel.bucket_size, dtype)
    return DistributedMuon(data_parallel, config.optimizer, config.model.hidden_size)
