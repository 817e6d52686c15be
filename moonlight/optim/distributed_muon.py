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

from moonlight.config.optimizer import Optimizer
from moonlight.config.run import Run
from moonlight.dist_checkpoint.chunks import Pieces
from moonlight.kernels.blocks import row_blocks
from moonlight.model.shards import pieces, pieces_of, turned
from moonlight.optim.data_parallel import DataParallel
from moonlight.optim.master_weights import Master, update_all
from moonlight.optim.matrix_exchange import Gathered
from moonlight.optim.newton_schulz import WORKSPACE_ELEMENTS, orthogonalize_all
from moonlight.optim.parameters import Owned, Rectangle
from moonlight.optim.update_rules import adamw_updates, directions_and_norms, muon_directions, muon_scale, to_unit_rms
from moonlight.placement.param_groups import GROUPS, rules_of

MOMENTA = {"muon": ("momentum",), "adamw": ("exp_avg", "exp_avg_sq")}


class ShardedOptimizer:
    """Updates the rows that this rank owns, and sends them on their way to the others."""

    def __init__(self, data_parallel: DataParallel, config: Optimizer, hidden_size: int) -> None:
        """`hidden_size`: of the model, which one kind of `rms_matching` scales by."""
        self.data_parallel, self.config, self._hidden_size = data_parallel, config, hidden_size
        self.owned: list[Owned] = []
        low = torch.bfloat16 if config.momentum_dtype == "bfloat16" else torch.float32
        for parameter, fragment, gradient in data_parallel.own():
            master = Master(parameter.weights[fragment.start : fragment.stop], config.master_weights)
            algorithm = parameter.rule.algorithm
            dtype = low if algorithm == "muon" else torch.float32
            momenta = [torch.zeros_like(gradient, dtype=dtype) for _ in MOMENTA[algorithm]]
            self.owned.append(Owned(parameter, fragment, gradient, master, momenta))
        adamw = [owned for owned in self.owned if owned.parameter.rule.algorithm == "adamw"]
        muon = [owned for owned in self.owned if owned.parameter.rule.algorithm == "muon"]
        self._adamw_batches = list(_batches(adamw))
        self._muon_batches = list(_batches([owned for owned in muon if owned.is_local]))
        self._dtype = torch.bfloat16 if config.newton_schulz_dtype == "bfloat16" else torch.float32
        shared = [owned for owned in muon if not owned.is_local]
        self._gathered = [
            Gathered(lane, data_parallel.parameters, shared, self._dtype)
            for lane in data_parallel.lanes
            if lane.buckets
        ]

    def master_state(self) -> dict[str, Pieces]:
        """This rank's rows of the float32 master weights, and router biases, under the names of the checkpoint."""
        return self._master_pieces([owned.master.values() for owned in self.owned])

    def momentum_state(self) -> dict[str, Pieces]:
        """This rank's rows of the momenta, under `optimizer.<momentum>.<parameter>`."""
        return _pieces(
            (f"optimizer.{name}.{owned.parameter.key}", owned, momentum)
            for owned in self.owned
            for name, momentum in zip(MOMENTA[owned.parameter.rule.algorithm], owned.momenta, strict=True)
        )

    def state_parts(self) -> Iterator[dict[str, Pieces]]:
        """`master_state` and `momentum_state` in parts: float32 of split masters is there for one part at a time."""
        for owned in self.owned:
            yield _pieces([(owned.parameter.key, owned, owned.master.values())])
        yield self._buffer_pieces() | self.momentum_state()

    def state_outline(self) -> dict[str, Pieces]:
        """`master_state` and `momentum_state` for their names, shapes and dtypes: split masters are meta tensors."""
        return self._master_pieces([owned.master.outline() for owned in self.owned]) | self.momentum_state()

    def gradient_state(self) -> dict[str, Pieces]:
        """This rank's rows of the world's gradient sums, under the names of the parameters."""
        return _pieces((owned.parameter.key, owned, owned.gradient) for owned in self.owned)

    @contextlib.contextmanager
    def fill_masters(self) -> Iterator[dict[str, Pieces]]:
        """`master_state` to write into; what was written is then rounded into the model of every rank.

        Split masters are in host memory meanwhile: float32 of all is more than a GPU has room for.
        """
        values = [owned.master.draft() for owned in self.owned]
        yield self._master_pieces(values)
        with torch.no_grad():
            for owned, value in zip(self.owned, values, strict=True):
                owned.master.store(value)
        self.data_parallel.start_weights()
        self.data_parallel.finish_weights()

    def state_bytes(self) -> int:
        """Bytes of master weights and momenta on this rank, the model's own weights apart."""
        momenta = sum(m.numel() * m.element_size() for owned in self.owned for m in owned.momenta)
        return momenta + sum(owned.master.state_bytes() for owned in self.owned)

    @torch.no_grad()
    def gradient_norms(self) -> dict[str, float]:
        """Norm of the world's gradient in each group of parameters: every element counted on exactly one rank."""
        sums = _group_sums()
        _add(sums, self.owned, [owned.gradient for owned in self.owned], [1.0] * len(self.owned), torch.float64)
        dist.all_reduce(sums)
        return {name: square**0.5 for name, (square, count) in zip(GROUPS, sums.tolist(), strict=True) if count}

    @torch.no_grad()
    def weight_sums(self) -> torch.Tensor:
        """Of this rank's master weights, what `step` returns of the update."""
        sums = _group_sums()
        for owned in self.owned:
            _add(sums, [owned], [owned.master.values()], [1.0])
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
        config = self.config
        scale = config.clip_grad_norm / (gradient_norm + 1e-6) if 0 < config.clip_grad_norm < gradient_norm else 1.0
        sums = _group_sums()

        def apply(members: Sequence[Owned], updates: Sequence[torch.Tensor], factors: Sequence[float]) -> None:
            for decays in (True, False):
                chosen = [
                    (owned.master, update, factor)
                    for owned, update, factor in zip(members, updates, factors, strict=True)
                    if owned.parameter.rule.decay == decays
                ]
                if chosen:
                    decay = weight_decay if decays else 0.0
                    update_all(*zip(*chosen, strict=True), learning_rate=learning_rate, weight_decay=decay)
            _add(sums, members, updates, factors)

        for batch in self._muon_batches:
            apply(batch, *self._scaled(batch, self._orthogonal_directions(batch, scale)))
        for gathered in self._gathered:
            results = gathered.run(self._directions(gathered.members, scale), self._orthogonalize)
            apply(gathered.members, *self._scaled(gathered.members, results))
            del results
        for batch in self._adamw_batches:
            apply(batch, self._adamw_updates(batch, step, scale), [1.0] * len(batch))
        self._scale_rows(row_factors or {})
        self.data_parallel.start_weights()
        return sums

    def _scale_rows(self, row_factors: dict[str, torch.Tensor]) -> None:
        assert row_factors.keys() <= {parameter.key for parameter in self.data_parallel.parameters}, list(row_factors)
        for owned in self.owned:
            if (factors := row_factors.get(owned.parameter.key)) is not None:
                assert factors.shape == (owned.parameter.rows,), (owned.parameter.key, factors.shape)
                values = owned.master.values()
                values.mul_(factors[owned.fragment.start : owned.fragment.stop].unsqueeze(-1))
                owned.master.store(values)

    def _master_pieces(self, values: Sequence[torch.Tensor]) -> dict[str, Pieces]:
        masters = _pieces((o.parameter.key, o, value) for o, value in zip(self.owned, values, strict=True))
        return masters | self._buffer_pieces()

    def _buffer_pieces(self) -> dict[str, Pieces]:
        return {key: pieces_of(buffer) for key, buffer in self.data_parallel.buffers.items()}

    def _directions(self, members: Sequence[Owned], scale: float) -> list[torch.Tensor]:
        gradients, momenta = [owned.gradient for owned in members], [owned.momenta[0] for owned in members]
        config = self.config
        return muon_directions(gradients, momenta, momentum=config.momentum, nesterov=config.nesterov, scale=scale)

    def _orthogonal_directions(self, members: Sequence[Owned], scale: float) -> list[torch.Tensor]:
        """Of matrices that are whole here; their directions are gone when it returns."""
        config = self.config
        directions, norms = directions_and_norms(
            [owned.gradient for owned in members],
            [owned.momenta[0] for owned in members],
            [math.prod(owned.whole_shape) for owned in members],
            momentum=config.momentum,
            nesterov=config.nesterov,
            scale=scale,
        )
        whole = [direction.view(-1, *owned.whole_shape) for owned, direction in zip(members, directions, strict=True)]
        return self._orthogonalize(whole, norms)

    def _adamw_updates(self, members: Sequence[Owned], step: int, scale: float) -> list[torch.Tensor]:
        config = self.config
        return adamw_updates(
            [owned.gradient.float() for owned in members],
            [owned.momenta[0] for owned in members],
            [owned.momenta[1] for owned in members],
            beta1=config.adamw_beta1,
            beta2=config.adamw_beta2,
            eps=config.adamw_eps,
            step=step,
            scale=scale,
        )

    def _orthogonalize(
        self, matrices: Sequence[torch.Tensor], norms: Sequence[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Of whole matrices, wherever they were brought together: what is one matrix's alone is done here."""
        config = self.config
        results = orthogonalize_all(matrices, config.num_newton_schulz_steps, config.coefficients, self._dtype, norms)
        return to_unit_rms(results) if config.rms_matching == "update_norm" else results

    def _scaled(
        self, members: Sequence[Owned], results: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[float]]:
        """Orthogonal matrices as updates [rows, columns] and the factors that give them the RMS of AdamW's: still to be
        multiplied on a GPU, where updates stay in their dtype, and already in float32 on a CPU."""
        updates = [result.reshape(owned.gradient.shape) for owned, result in zip(members, results, strict=True)]
        rms, matching = self.config.rms_match, self.config.rms_matching
        factors = [muon_scale(*owned.whole_shape, rms, matching, self._hidden_size) for owned in members]
        if members and members[0].gradient.device.type != "cpu":
            return updates, factors
        return [u.float() * factor for u, factor in zip(updates, factors, strict=True)], [1.0] * len(members)


def _group_sums() -> torch.Tensor:
    """Sum of squares and count of elements of each of GROUPS, still 0."""
    return torch.zeros(len(GROUPS), 2, dtype=torch.float64, device=torch.cuda.current_device())


def _add(
    sums: torch.Tensor,
    members: Sequence[Owned],
    values: Sequence[torch.Tensor],
    factors: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Add factor * values of owned rows to the sums of their groups, every element of the world once.

    `dtype`: of the norms."""
    of_group: dict[int, list[tuple[torch.Tensor, float]]] = {}
    for owned, value, factor in zip(members, values, factors, strict=True):
        if owned.counts:
            of_group.setdefault(GROUPS.index(owned.parameter.group), []).append((value, factor))
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


def _pieces(values: Iterable[tuple[str, Owned, torch.Tensor]]) -> dict[str, Pieces]:
    """Rectangles by name, of tensors that hold owned rows."""
    shapes: dict[str, tuple[int, ...]] = {}
    rectangles: dict[str, list[Rectangle]] = {}
    for key, owned, tensor in values:
        shapes[key] = turned(pieces(owned.parameter.sharded)[0].global_shape)
        found = owned.parameter.rectangles(owned.fragment.start, owned.fragment.stop, tensor)
        rectangles.setdefault(key, []).extend(found)
    return {key: Pieces(shape, rectangles[key]) for key, shape in shapes.items()}


def _batches(local: Sequence[Owned]) -> Iterator[list[Owned]]:
    """Runs of matrices, like shapes together, of at most WORKSPACE_ELEMENTS (or one matrix); of rows for AdamW."""
    limit = WORKSPACE_ELEMENTS[local[0].gradient.device.type] if local else 0
    parts = [part for owned in local for part in owned.parts(limit)]
    batch: list[Owned] = []
    elements = 0
    for part in sorted(parts, key=lambda part: part.whole_shape):
        if batch and elements + part.gradient.numel() > limit:
            yield batch
            batch, elements = [], 0
        batch.append(part)
        elements += part.gradient.numel()
    if batch:
        yield batch


def make_optimizer(models: Sequence[GPTModel], run: Run) -> ShardedOptimizer:
    """The optimizer that a recipe asks for, over this rank's model chunks."""
    rules = rules_of(run.optimizer, run.model)
    dtype = torch.bfloat16 if run.optimizer.gradient_dtype == "bfloat16" else torch.float32
    data_parallel = DataParallel(models, rules, run.parallel.bucket_size, dtype)
    return ShardedOptimizer(data_parallel, run.optimizer, run.model.hidden_size)
