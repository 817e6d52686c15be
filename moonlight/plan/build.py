"""The plan of a recipe on N GPUs: put together from what stages have in common and what their ranks own."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

from moonlight.config.run import Run
from moonlight.config.timeline import Timeline
from moonlight.dist_checkpoint import hf_mapping
from moonlight.placement.comm_bytes import Share, adamw_share, momentum_bytes
from moonlight.placement.param_groups import matrix_heights
from moonlight.plan.cut import PlannedParameter
from moonlight.plan.hardware import Machine
from moonlight.plan.owners import Lane, Rank, exact_lane, largest, mean_lane
from moonlight.plan.speed import StepSeconds, step_seconds
from moonlight.plan.stages import Stage, make_stages


@dataclass(frozen=True)
class Line:
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
class Memory:
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
class Plan:
    """The whole recipe."""

    run: Run
    world_size: int
    machine: Machine
    timeline: Timeline
    global_batch_size: int
    """The one that most tokens are trained with; figures of a step are of this batch."""
    stages: list[Stage]
    lines: list[Line]
    """Empty in a sketch."""
    members: list[Rank]
    """Every rank of the world; in a sketch, one mean rank of each stage."""
    adamw: list[Share]
    """The same under AdamW with sharded state (ZeRO-1)."""
    worst: list[Rank]
    """Of each stage, the largest of each figure of the exchange."""
    num_router_biases: int

    @property
    def ranks(self) -> list[Share]:
        """What each rank sends, receives and keeps for its share."""
        return [member.share for member in self.members]

    def stage_of(self, number: int) -> Stage:
        """The stage of one of `members`."""
        return self.stages[number * len(self.stages) // len(self.members)]

    @cached_property
    def memories(self) -> list[Memory]:
        """Of each of `members`."""
        return [_memory(self.stage_of(number), member) for number, member in enumerate(self.members)]

    @property
    def fullest(self) -> int:
        """The one of `members` that needs most memory."""
        return max(range(len(self.members)), key=lambda number: self.memories[number].peak)

    @cached_property
    def seconds(self) -> StepSeconds:
        """Of a step with `global_batch_size`."""
        return self._seconds(self.stages)

    def _seconds(self, stages: list[Stage]) -> StepSeconds:
        newton_schulz = max(member.newton_schulz_flops for member in self.members)
        return step_seconds(self.run, self.world_size, self.machine, stages, self.worst, newton_schulz)

    @cached_property
    def total_seconds(self) -> float:
        """Of the whole recipe: every step at the time of its own batch."""
        counts = self.timeline.steps_by_batch_size()
        return sum(
            count * self._seconds(make_stages(self.run, self.world_size, size)).total for size, count in counts.items()
        )

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.run.data.sequence_length

    @property
    def num_tokens(self) -> int:
        """Of the whole recipe."""
        return self.timeline.num_sequences * self.run.data.sequence_length

    @property
    def checkpoint_bytes(self) -> int:
        """float32 master weights and router biases, and momenta as they are; everything once."""
        momenta = momentum_bytes(self.run) * self.num_parameters("muon") + 8 * self.num_parameters("adamw")
        return 4 * (self.num_parameters("muon") + self.num_parameters("adamw") + self.num_router_biases) + momenta

    def num_parameters(self, algorithm: str) -> int:
        """Elements that one algorithm updates."""
        return sum(math.prod(line.shape) for line in self.lines if line.algorithm == algorithm)

    @property
    def num_matrices(self) -> int:
        """Matrices that Muon orthogonalises in a step."""
        return sum(sum(line.matrices.values()) for line in self.lines)


def make_plan(run: Run, world_size: int, machine: Machine | None = None) -> Plan:
    """Plan a recipe for `world_size` processes.

    Raises:
        UserError: the layout or the batch does not divide the processes.
    """
    parallel = run.parallel
    run.check_batches(world_size)
    timeline = Timeline(run)
    batch = most_trained_batch(timeline)
    stages = make_stages(run, world_size, batch)
    dense_size, expert_size = lane_sizes(run, world_size)
    lines: list[Line] = []
    members: list[Rank] = []
    adamw: list[Share] = []
    worst: list[Rank] = []
    for stage in stages:
        lanes, baselines = [], []
        owners: dict[int, set[int]] = {}
        for is_expert, size, slices in (
            (False, dense_size, parallel.tensor_parallel_size),
            (True, expert_size, parallel.expert_tensor_parallel_size),
        ):
            own = [parameter for parameter in stage.parameters if parameter.is_expert == is_expert]
            lane = exact_lane(own, size, slices, run)
            lanes.append(lane)
            owners |= lane.owners
            twice = sum(parameter.numel for parameter in own if parameter.outline.on_two_stages)
            baselines.append(adamw_share(sum(parameter.numel for parameter in own), size, run, twice))
        lines += [_line(p, owners[p.outline.index]) for p in stage.parameters if not p.is_copy]
        members += of_world(run, world_size, *lanes)
        adamw += [baselines[0] + baselines[1]] * (world_size // len(stages))
        worst.append(Rank(*(largest([held for peers in lane.ranks for held in peers]) for lane in lanes)))
    return Plan(
        run, world_size, machine or Machine(), timeline, batch, stages, lines, members, adamw, worst, _num_biases(run)
    )


def sketch_plan(run: Run, world_size: int, machine: Machine) -> Plan:
    """The same with mean shares in place of owners: for a search. It knows no parameters' owners and no unevenness."""
    run.check_batches(world_size)
    timeline = Timeline(run)
    batch = most_trained_batch(timeline)
    stages = make_stages(run, world_size, batch)
    sizes = lane_sizes(run, world_size)
    slices = (run.parallel.tensor_parallel_size, run.parallel.expert_tensor_parallel_size)
    means = []
    for stage in stages:
        dense, expert = (
            mean_lane(
                [p for p in stage.parameters if p.is_expert == is_expert], sizes[is_expert], slices[is_expert], run
            )
            for is_expert in (False, True)
        )
        means.append(Rank(dense, expert))
    return Plan(run, world_size, machine, timeline, batch, stages, [], means, [], means, 0)


def most_trained_batch(timeline: Timeline) -> int:
    """The global batch size that most tokens are trained with."""
    counts = timeline.steps_by_batch_size()
    return max(counts, key=lambda size: size * counts[size])


def lane_sizes(run: Run, world_size: int) -> tuple[int, int]:
    """Data-parallel ranks of dense and of expert parameters."""
    parallel = run.parallel
    of_stage = world_size // parallel.pipeline_parallel_size
    inner = parallel.expert_tensor_parallel_size * parallel.expert_parallel_size
    return of_stage // parallel.tensor_parallel_size, of_stage // inner


def of_world(run: Run, world_size: int, dense: Lane, expert: Lane) -> list[Rank]:
    """Every rank of one pipeline stage, in Megatron's order of ranks."""
    parallel = run.parallel
    tp, etp = parallel.tensor_parallel_size, parallel.expert_tensor_parallel_size
    inner = etp * parallel.expert_parallel_size
    return [
        Rank(dense.ranks[rank // tp][rank % tp], expert.ranks[rank // inner][rank % etp])
        for rank in range(world_size // parallel.pipeline_parallel_size)
    ]


def mean_memory(memories: Sequence[Memory]) -> Memory:
    """Part by part, over all ranks."""
    return Memory(
        **{field.name: sum(getattr(m, field.name) for m in memories) / len(memories) for field in fields(Memory)}
    )


def _memory(stage: Stage, rank: Rank) -> Memory:
    share = rank.share
    return Memory(
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


def _line(parameter: PlannedParameter, owners: set[int]) -> Line:
    shape, rule = parameter.whole_shape, parameter.rule
    heights = matrix_heights(rule, shape) if rule.algorithm == "muon" else []
    matrices = Counter((height, shape[-1]) for height in heights)
    return Line(parameter.key, shape, rule.algorithm, rule.decay, dict(matrices), tuple(sorted(owners)))


def _num_biases(run: Run) -> int:
    return sum(math.prod(row.shape) for row in hf_mapping.table(run.model) if row.parts[0].kind == "bias")
