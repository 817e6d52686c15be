"""Seconds of a step, from a simple model: arithmetic at a fraction of peak FLOP/s, plus communication that arithmetic
does not hide. It does not model kernels, contention or stragglers."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from moonlight.config.run import RunConfig
from moonlight.plan.hardware import GPUS_PER_NODE, HardwareModel
from moonlight.plan.owners import RankCost
from moonlight.plan.stages import PipelineStage


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step by part; the parts add up to `total`."""

    arithmetic: float
    """Forward and backward pass of the most loaded stage, including recomputation."""
    slices: float
    """Tensor-parallel communication, not overlapped."""
    dispatch: float
    """Tokens to experts and back, not overlapped."""
    bubble: float
    """Time that a stage waits for other stages."""
    pipeline: float
    """Hidden states between stages, not overlapped."""
    gradients: float
    """Gradients to their owners, beyond the backward pass of the last micro-batch."""
    newton_schulz: float
    """On the most loaded rank."""
    matrices: float
    """Shards of matrices to the rank that orthogonalizes them, and back, not overlapped."""
    weights: float
    """Weights from their owners, beyond the forward pass of the first micro-batch."""

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def bubble_fraction(config: RunConfig, num_micro_batches: int) -> float:
    """Return the fraction of a step that a pipeline stage waits: (p - 1) / (v m + p - 1).

    p is the number of stages, v the number of chunks of a stage, and m the number of micro-batches.
    """
    stages, virtual = config.parallel.pipeline_parallel_size, config.parallel.virtual_pipeline_parallel_size
    return (stages - 1) / (virtual * num_micro_batches + stages - 1)


def step_seconds(
    config: RunConfig,
    world_size: int,
    machine: HardwareModel,
    stages: Sequence[PipelineStage],
    stage_maxima: Sequence[RankCost],
    newton_schulz_flops: float,
) -> StepTime:
    """Compute the seconds of a step, each part for the stage that takes longest.

    Args:
        stage_maxima: for each stage, the maximum of each cost over its ranks.
        newton_schulz_flops: FLOPs of Newton-Schulz on the most loaded rank.
    """
    parallel = config.parallel
    tp, etp, ep = (parallel.tensor_parallel_size, parallel.expert_tensor_parallel_size, parallel.expert_parallel_size)
    stage_size = world_size // parallel.pipeline_parallel_size
    arithmetic = max(machine.arithmetic_seconds(stage.flops + stage.recomputed_flops) for stage in stages)
    slices = max(
        machine.comm_seconds(stage.comm_bytes["slices"], tp, 1)
        + machine.comm_seconds(stage.comm_bytes["expert slices"], etp, 1)
        for stage in stages
    )
    dispatch = max(machine.comm_seconds(stage.comm_bytes["dispatch"], ep, etp) for stage in stages)
    bubble = bubble_fraction(config, stages[0].num_micro_batches)
    busy = arithmetic + slices + dispatch
    num_stages = parallel.pipeline_parallel_size
    # If the job spans several nodes, some neighboring stages are on two nodes. The slowest pair counts.
    stride = stage_size if world_size <= GPUS_PER_NODE else GPUS_PER_NODE
    count = stages[0].num_micro_batches
    forward, backward = busy / count / 3, busy / count * 2 / 3

    def exchange(rank: RankCost, kind: str) -> float:
        """Return the time of one kind of bytes of dense and of expert parameters, which share the network."""
        dense, expert = (getattr(part.optimizer_cost, kind) for part in (rank.dense, rank.expert))
        return machine.comm_seconds(dense, stage_size // tp, tp) + machine.comm_seconds(
            expert, stage_size // (etp * ep), etp * ep
        )

    return StepTime(
        arithmetic=arithmetic,
        slices=slices,
        dispatch=dispatch,
        bubble=busy * bubble / (1 - bubble),
        pipeline=max(
            machine.comm_seconds(stage.comm_bytes["pipeline"], min(num_stages, 2), stride) for stage in stages
        ),
        gradients=max(0.0, *(exchange(rank, "gradients") - backward for rank in stage_maxima)),
        newton_schulz=machine.arithmetic_seconds(newton_schulz_flops),
        matrices=max(
            exchange(rank, "matrices")
            + machine.comm_seconds(rank.dense.slices, tp, 1)
            + machine.comm_seconds(rank.expert.slices, etp, 1)
            for rank in stage_maxima
        ),
        weights=max(0.0, *(exchange(rank, "weights") - forward for rank in stage_maxima)),
    )
