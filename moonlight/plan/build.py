"""The plan of a recipe on N GPUs: put together from what stages have in common and what their ranks own."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
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
    """One parameter of the whole model."""

    key: str
    """Name in checkpoints."""
    shape: tuple[int, ...]
    algorithm: str
    decay: bool
    matrices: dict[tuple[int, int], int]
    """Shape -> count of what is orthogonalised; empty for AdamW."""
    owners: tuple[int, ...]
    """Ranks of its data-parallel group (for experts, of their own) that own rows of it."""


@dataclass(frozen=True, kw_only=True)
class MemoryBreakdown:
    """Bytes of one rank by part. Activations and exchange are there during forward and backward pass, `update` after
    them, all else always."""

    weights: float
    gradient_sums: float
    gradient_shards: float
    """The world's sums of the rows that the rank owns."""
    masters: float
    momenta: float
    buffers: float
    activations: float
    loss: float
    """A chunk of logits, and the head's gradient in float32."""
    exchange: float
    """Buffers of gradients and weights on the wire."""
    update: float
    """Newton-Schulz, and matrices brought together."""

    @property
    def state(self) -> float:
        """What is always there."""
        return self.weights + self.gradient_sums + self.gradient_shards + self.masters + self.momenta + self.buffers

    @property
    def passes(self) -> float:
        """In forward and backward pass, besides. Gradients leave when the loss is made."""
        return self.activations + max(self.loss, self.exchange)

    @property
    def peak(self) -> float:
        return self.state + max(self.passes, self.update)


@dataclass(frozen=True)
class RunPlan:
    """The whole recipe."""

    config: RunConfig
    world_size: int
    machine: HardwareModel
    timeline: RunSchedule
    global_batch_size: int
    """The one that most tokens are trained with; figures of a step are of this batch."""
    stages: list[PipelineStage]
    params: list[ParamLine]
    """Empty in a sketch."""
    ranks: list[RankCost]
    """Every rank of the world; in a sketch, one mean rank of each stage."""
    adamw: list[OptimizerCost]
    """The same under AdamW with sharded state (ZeRO-1)."""
    stage_maxima: list[RankCost]
    """Of each stage, the largest of each figure of the exchange."""
    num_router_biases: int

    @property
    def optimizer_costs(self) -> list[OptimizerCost]:
        """What each rank sends, receives and keeps for its share."""
        return [member.share for member in self.ranks]

    def rank_stage(self, rank: int) -> PipelineStage:
        """The stage of one of `members`."""
        return self.stages[rank * len(self.stages) // len(self.ranks)]

    @cached_property
    def memories(self) -> list[MemoryBreakdown]:
        """Of each of `members`."""
        return [_memory(self.rank_stage(index), member) for index, member in enumerate(self.ranks)]

    @property
    def peak_rank(self) -> int:
        """The one of `members` that needs most memory."""
        return max(range(len(self.ranks)), key=lambda number: self.memories[number].peak)

    @cached_property
    def seconds(self) -> StepTime:
        """Of a step with `global_batch_size`."""
        return self._seconds(self.stages)

    def _seconds(self, stages: list[PipelineStage]) -> StepTime:
        newton_schulz = max(member.newton_schulz_flops for member in self.ranks)
        return step_seconds(self.config, self.world_size, self.machine, stages, self.stage_maxima, newton_schulz)

    @cached_property
    def total_seconds(self) -> float:
        """Of the whole recipe: every step at the time of its own batch."""
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
        """Of the whole recipe."""
        return self.timeline.num_sequences * self.config.data.sequence_length

    @property
    def checkpoint_bytes(self) -> int:
        """float32 master weights and router biases, and momenta as they are; everything once."""
        momenta = momentum_bytes(self.config) * self.num_parameters("muon") + 8 * self.num_parameters("adamw")
        return 4 * (self.num_parameters("muon") + self.num_parameters("adamw") + self.num_router_biases) + momenta

    def num_parameters(self, algorithm: str) -> int:
        """Elements that one algorithm updates."""
        return sum(math.prod(line.shape) for line in self.params if line.algorithm == algorithm)

    @property
    def num_matrices(self) -> int:
        """Matrices that Muon orthogonalises in a step."""
        return sum(sum(line.matrices.values()) for line in self.params)


def make_plan(config: RunConfig, world_size: int, machine: HardwareModel | None = None) -> RunPlan:
    """Plan a recipe for `world_size` processes.

    Raises:
        UserError: the layout or the batch does not divide the processes.
    """
    parallel = config.parallel
    config.check_batches(world_size)
    timeline = RunSchedule(config)
    batch = most_trained_batch_size(timeline)
    stages = make_stages(config, world_size, batch)
    dense_size, expert_size = data_parallel_sizes(config, world_size)
    lines: list[ParamLine] = []
    members: list[RankCost] = []
    adamw: list[OptimizerCost] = []
    worst: list[RankCost] = []
    for stage in stages:
        lanes, baselines = [], []
        owners: dict[int, set[int]] = {}
        for is_expert, size, slices in (
            (False, dense_size, parallel.tensor_parallel_size),
            (True, expert_size, parallel.expert_tensor_parallel_size),
        ):
            own = [parameter for parameter in stage.parameters if parameter.is_expert == is_expert]
            lane = group_costs(own, size, slices, config)
            lanes.append(lane)
            owners |= lane.owners
            twice = sum(parameter.numel for parameter in own if parameter.spec.is_shared_embedding)
            baselines.append(zero1_cost(sum(parameter.numel for parameter in own), size, config, twice))
        lines += [_line(p, owners[p.spec.index]) for p in stage.parameters if not p.is_embedding_replica]
        members += stage_ranks(config, world_size, *lanes)
        adamw += [baselines[0] + baselines[1]] * (world_size // len(stages))
        worst.append(RankCost(*(largest([held for peers in lane.ranks for held in peers]) for lane in lanes)))
    return RunPlan(
        config,
        world_size,
        machine or HardwareModel(),
        timeline,
        batch,
        stages,
        lines,
        members,
        adamw,
        worst,
        _num_biases(config),
    )


def estimate_plan(config: RunConfig, world_size: int, machine: HardwareModel) -> RunPlan:
    """The same with mean shares in place of owners: for a search. It knows no parameters' owners and no unevenness."""
    config.check_batches(world_size)
    timeline = RunSchedule(config)
    batch = most_trained_batch_size(timeline)
    stages = make_stages(config, world_size, batch)
    sizes = data_parallel_sizes(config, world_size)
    slices = (config.parallel.tensor_parallel_size, config.parallel.expert_tensor_parallel_size)
    means = []
    for stage in stages:
        dense, expert = (
            mean_group_cost(
                [p for p in stage.parameters if p.is_expert == is_expert], sizes[is_expert], slices[is_expert], config
            )
            for is_expert in (False, True)
        )
        means.append(RankCost(dense, expert))
    return RunPlan(config, world_size, machine, timeline, batch, stages, [], means, [], means, 0)


def most_trained_batch_size(timeline: RunSchedule) -> int:
    """The global batch size that most tokens are trained with."""
    counts = timeline.steps_by_batch_size()
    return max(counts, key=lambda size: size * counts[size])


def data_parallel_sizes(config: RunConfig, world_size: int) -> tuple[int, int]:
    """Data-parallel ranks of dense and of expert parameters."""
    parallel = config.parallel
    of_stage = world_size // parallel.pipeline_parallel_size
    inner = parallel.expert_tensor_parallel_size * parallel.expert_parallel_size
    return of_stage // parallel.tensor_parallel_size, of_stage // inner


def stage_ranks(config: RunConfig, world_size: int, dense: GroupCosts, expert: GroupCosts) -> list[RankCost]:
    """Every rank of one pipeline stage, in Megatron's order of ranks."""
    parallel = config.parallel
    tp, etp = parallel.tensor_parallel_size, parallel.expert_tensor_parallel_size
    inner = etp * parallel.expert_parallel_size
    return [
        RankCost(dense.ranks[rank // tp][rank % tp], expert.ranks[rank // inner][rank % etp])
        for rank in range(world_size // parallel.pipeline_parallel_size)
    ]


def mean_memory(memories: Sequence[MemoryBreakdown]) -> MemoryBreakdown:
    """Part by part, over all ranks."""
    return MemoryBreakdown(
        **{
            field.name: sum(getattr(m, field.name) for m in memories) / len(memories)
            for field in fields(MemoryBreakdown)
        }
    )


def _memory(stage: PipelineStage, rank: RankCost) -> MemoryBreakdown:
    share = rank.share
    return MemoryBreakdown(
        weights=stage.weights,
        gradient_sums=stage.gradient_sums,
        gradient_shards=rank.gradient_shards,
        masters=share.masters,
        momenta=share.momenta,
        buffers=stage.buffers,
        activations=stage.activations,
        loss=stage.loss,
        exchange=rank.exchange_buffers,
        update=rank.update,
    )


def _line(parameter: PlannedParam, owners: set[int]) -> ParamLine:
    shape, rule = parameter.global_shape, parameter.rule
    heights = rows_per_matrix(rule, shape) if rule.algorithm == "muon" else []
    matrices = Counter((height, shape[-1]) for height in heights)
    return ParamLine(parameter.key, shape, rule.algorithm, rule.use_weight_decay, dict(matrices), tuple(sorted(owners)))


def _num_biases(config: RunConfig) -> int:
    return sum(
        math.prod(row.shape)
        for row in hf_mapping.tensor_mappings(config.model)
        if row.hf_tensors[0].init_kind == "bias"
    )
