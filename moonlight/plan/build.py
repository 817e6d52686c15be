"""The plan of a recipe on N GPUs, assembled from the costs of each pipeline stage and of the rows each rank owns."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from moonlight.config.run import RunConfig
from moonlight.config.timeline import RunSchedule
from moonlight.dist_checkpoint import hf_mapping
from moonlight.placement.comm_bytes import OptimizerCost, momentum_bytes, zero1_cost
from moonlight.placement.param_groups import rows_per_matrix
from moonlight.plan.cut import PlannedParam
from moonlight.plan.hardware import HardwareModel
from moonlight.plan.owners import GroupCosts, RankCost, group_costs, largest, mean_group_cost
from moonlight.plan.speed import StepTime, step_seconds
from moonlight.plan.stages import PipelineStage, make_stages


@dataclass(frozen=True)
class ParamLine:
    """One parameter of the full model."""

    key: str
    """Name in checkpoints."""
    shape: tuple[int, ...]
    algorithm: str
    decay: bool
    matrices: dict[tuple[int, int], int]
    """Shape -> count of the matrices that Muon orthogonalizes; empty for AdamW."""
    owners: tuple[int, ...]
    """Ranks of its data-parallel group (for experts, their expert-data-parallel group) that own rows of it."""


@dataclass(frozen=True, kw_only=True)
class MemoryBreakdown:
    """Bytes of one rank by part.

    A step allocates activations, loss and exchange during forward and backward pass, and `update` after them. The other
    parts stay allocated.
    """

    weights: float
    gradient_sums: float
    gradient_shards: float
    """Sums over all data-parallel ranks of the rows that the rank owns."""
    masters: float
    momenta: float
    buffers: float
    activations: float
    loss: float
    """A chunk of logits, and the head's gradient in float32."""
    exchange: float
    """Buffers of gradients and weights in flight."""
    update: float
    """Newton-Schulz, and gathered matrices."""

    @property
    def state(self) -> float:
        """Bytes that stay allocated between steps."""
        return self.weights + self.gradient_sums + self.gradient_shards + self.masters + self.momenta + self.buffers

    @property
    def passes(self) -> float:
        """Bytes that forward and backward pass need in addition. Gradients are sent after the loss has run."""
        return self.activations + max(self.loss, self.exchange)

    @property
    def peak(self) -> float:
        return self.state + max(self.passes, self.update)


@dataclass(frozen=True)
class RunPlan:
    """A recipe on `world_size` GPUs, either planned exactly or estimated.

    `make_plan` places every row on its owner rank. `estimate_plan` uses means over ranks instead.
    """

    config: RunConfig
    world_size: int
    machine: HardwareModel
    timeline: RunSchedule
    stages: list[PipelineStage]
    params: list[ParamLine]
    """Empty in an estimate."""
    ranks: list[RankCost]
    """Every rank of the world; in an estimate, one mean rank per stage."""
    adamw: list[OptimizerCost]
    """Costs of the same ranks under AdamW with sharded state (ZeRO-1); empty in an estimate."""
    stage_maxima: list[RankCost]
    """For each stage, the maximum of each cost over its ranks."""

    @property
    def global_batch_size(self) -> int:
        """The batch size that most tokens are trained with; all numbers of a step are for this batch size."""
        return most_trained_batch_size(self.timeline)

    @property
    def num_router_biases(self) -> int:
        mappings = hf_mapping.tensor_mappings(self.config.model)
        return sum(math.prod(mapping.shape) for mapping in mappings if mapping.hf_tensors[0].init_kind == "bias")

    @property
    def optimizer_costs(self) -> list[OptimizerCost]:
        """Bytes that each of `ranks` sends, receives and keeps for the rows it owns."""
        return [cost.optimizer_cost for cost in self.ranks]

    def rank_stage(self, rank: int) -> PipelineStage:
        """Return the pipeline stage of an index of `ranks`."""
        return self.stages[rank * len(self.stages) // len(self.ranks)]

    @cached_property
    def memories(self) -> list[MemoryBreakdown]:
        """Memory of each of `ranks`."""
        return [_memory(self.rank_stage(index), cost) for index, cost in enumerate(self.ranks)]

    @property
    def peak_rank(self) -> int:
        """Index of the rank that needs the most memory."""
        return max(range(len(self.ranks)), key=lambda index: self.memories[index].peak)

    @cached_property
    def seconds(self) -> StepTime:
        """Time of a step with `global_batch_size`."""
        return self._seconds(self.stages)

    def _seconds(self, stages: list[PipelineStage]) -> StepTime:
        newton_schulz = max(cost.newton_schulz_flops for cost in self.ranks)
        return step_seconds(self.config, self.world_size, self.machine, stages, self.stage_maxima, newton_schulz)

    @cached_property
    def total_seconds(self) -> float:
        """Seconds of the entire run: each step at the time of its own batch size."""
        counts = self.timeline.steps_by_batch_size()
        return sum(
            count * self._seconds(make_stages(self.config, self.world_size, size)).total
            for size, count in counts.items()
        )

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.config.data.sequence_length

    @property
    def num_tokens(self) -> int:
        """Tokens of the entire run."""
        return self.timeline.num_sequences * self.config.data.sequence_length

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint: float32 master weights and router biases, momenta in their own dtype, each once."""
        momenta = momentum_bytes(self.config) * self.num_parameters("muon") + 8 * self.num_parameters("adamw")
        return 4 * (self.num_parameters("muon") + self.num_parameters("adamw") + self.num_router_biases) + momenta

    def num_parameters(self, algorithm: str) -> int:
        """Return the number of elements that `algorithm` ("muon" or "adamw") updates."""
        return sum(math.prod(line.shape) for line in self.params if line.algorithm == algorithm)

    @property
    def num_matrices(self) -> int:
        """Number of matrices that Muon orthogonalizes in a step."""
        return sum(sum(line.matrices.values()) for line in self.params)


def make_plan(config: RunConfig, world_size: int, machine: HardwareModel | None = None) -> RunPlan:
    """Plan a recipe for `world_size` processes.

    Raises:
        UserError: the layout or the batch does not divide the processes.
    """
    config.check_batches(world_size)
    timeline = RunSchedule(config)
    stages = make_stages(config, world_size, most_trained_batch_size(timeline))
    params: list[ParamLine] = []
    ranks: list[RankCost] = []
    adamw: list[OptimizerCost] = []
    stage_maxima: list[RankCost] = []
    for stage in stages:
        groups, baselines = [], []
        owners: dict[int, set[int]] = {}
        for parameters, size, slices in _parameter_groups(config, world_size, stage):
            group = group_costs(parameters, size, slices, config)
            groups.append(group)
            owners |= group.owners
            shared = sum(parameter.numel for parameter in parameters if parameter.spec.is_shared_embedding)
            baselines.append(zero1_cost(sum(parameter.numel for parameter in parameters), size, config, shared))
        params += [_line(p, owners[p.spec.index]) for p in stage.parameters if not p.is_embedding_replica]
        ranks += stage_ranks(config, world_size, *groups)
        adamw += [baselines[0] + baselines[1]] * (world_size // len(stages))
        stage_maxima.append(RankCost(*(largest([cost for peers in group.ranks for cost in peers]) for group in groups)))
    return RunPlan(config, world_size, machine or HardwareModel(), timeline, stages, params, ranks, adamw, stage_maxima)


def estimate_plan(config: RunConfig, world_size: int, machine: HardwareModel) -> RunPlan:
    """Plan a recipe with means over ranks instead of owner ranks, for the search of `--suggest`.

    The estimate omits row ownership and uneven loads. It is close to `make_plan` and much faster.

    Raises:
        UserError: the layout or the batch does not divide the processes.
    """
    config.check_batches(world_size)
    timeline = RunSchedule(config)
    stages = make_stages(config, world_size, most_trained_batch_size(timeline))
    means = [
        RankCost(*(mean_group_cost(*group, config) for group in _parameter_groups(config, world_size, stage)))
        for stage in stages
    ]
    return RunPlan(config, world_size, machine, timeline, stages, [], means, [], means)


def most_trained_batch_size(timeline: RunSchedule) -> int:
    """Return the global batch size that most tokens are trained with."""
    counts = timeline.steps_by_batch_size()
    return max(counts, key=lambda size: size * counts[size])


def _parameter_groups(
    config: RunConfig, world_size: int, stage: PipelineStage
) -> Iterator[tuple[list[PlannedParam], int, int]]:
    """Yield (parameters, data-parallel size, tensor-parallel size) of dense parameters, then of experts."""
    parallel = config.parallel
    stage_size = world_size // parallel.pipeline_parallel_size
    tp, etp = parallel.tensor_parallel_size, parallel.expert_tensor_parallel_size
    yield [p for p in stage.parameters if not p.is_expert], stage_size // tp, tp
    yield [p for p in stage.parameters if p.is_expert], stage_size // (etp * parallel.expert_parallel_size), etp


def stage_ranks(config: RunConfig, world_size: int, dense: GroupCosts, expert: GroupCosts) -> list[RankCost]:
    """Return the costs of every rank of one pipeline stage, in Megatron's rank order."""
    parallel = config.parallel
    tp, etp = parallel.tensor_parallel_size, parallel.expert_tensor_parallel_size
    expert_inner_size = etp * parallel.expert_parallel_size
    return [
        RankCost(dense.ranks[rank // tp][rank % tp], expert.ranks[rank // expert_inner_size][rank % etp])
        for rank in range(world_size // parallel.pipeline_parallel_size)
    ]


def mean_memory(memories: Sequence[MemoryBreakdown]) -> MemoryBreakdown:
    """Return the mean of each part over all ranks."""
    parts = [asdict(memory) for memory in memories]
    return MemoryBreakdown(**{name: sum(part[name] for part in parts) / len(parts) for name in parts[0]})


def _memory(stage: PipelineStage, rank: RankCost) -> MemoryBreakdown:
    optimizer_cost = rank.optimizer_cost
    return MemoryBreakdown(
        weights=stage.weights,
        gradient_sums=stage.gradient_sums,
        gradient_shards=rank.gradient_shards,
        masters=optimizer_cost.masters,
        momenta=optimizer_cost.momenta,
        buffers=stage.buffers,
        activations=stage.activations,
        loss=stage.loss,
        exchange=rank.exchange_buffers,
        update=rank.update,
    )


def _line(parameter: PlannedParam, owners: set[int]) -> ParamLine:
    shape, rule = parameter.global_shape, parameter.rule
    matrix_rows = rows_per_matrix(rule, shape) if rule.algorithm == "muon" else []
    matrices = Counter((rows, shape[-1]) for rows in matrix_rows)
    return ParamLine(parameter.key, shape, rule.algorithm, rule.use_weight_decay, dict(matrices), tuple(sorted(owners)))
