"""Seconds of a step, by a simple and stated model: arithmetic at a share of the peak, and what of the exchange is not
hidden behind it. It knows no kernels, no contention and no stragglers."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from moonlight.config.run import RunConfig
from moonlight.placement.comm_bytes import CommBytes
from moonlight.plan.hardware import GPUS_OF_A_NODE, HardwareModel
from moonlight.plan.owners import RankCost
from moonlight.plan.stages import PipelineStage


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Where the seconds of a step go; they add up to `total`."""

    arithmetic: float
    """Forward and backward pass of the stage with most, and what is made again."""
    slices: float
    """Tensor parallelism, nothing of it hidden."""
    dispatch: float
    """Tokens to experts and back, nothing of it hidden."""
    bubble: float
    """A stage waits for others, for its share of the above."""
    pipeline: float
    """Hidden states between stages, nothing of it hidden."""
    gradients: float
    """To their owners, beyond what the last micro-batch's backward pass hides."""
    newton_schulz: float
    """Of the rank with most."""
    matrices: float
    """Parts of matrices to whom orthogonalises them, and back, nothing of it hidden."""
    weights: float
    """From their owners, beyond what the first micro-batch's forward pass hides."""

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def bubble_fraction(config: RunConfig, num_micro_batches: int) -> float:
    """Share of a step that a pipeline stage waits: (p - 1) / (v m + p - 1)."""
    stages, virtual = config.parallel.pipeline_parallel_size, config.parallel.virtual_pipeline_parallel_size
    return (stages - 1) / (virtual * num_micro_batches + stages - 1)


def step_seconds(
    config: RunConfig,
    world_size: int,
    machine: HardwareModel,
    stages: Sequence[PipelineStage],
    worst: Sequence[RankCost],
    newton_schulz_flops: float,
) -> StepTime:
    """Of a step, each line by the stage that takes longest.

    Args:
        worst: of every stage, the largest of each figure over its ranks.
        newton_schulz_flops: of the rank with most.
    """
    parallel = config.parallel
    tp, etp, ep = (
        parallel.tensor_parallel_size,
        parallel.expert_tensor_parallel_size,
        parallel.expert_parallel_size,
    )
    of_stage = world_size // parallel.pipeline_parallel_size
    arithmetic = max(machine.arithmetic_seconds(stage.flops + stage.recomputed_flops) for stage in stages)
    slices = max(
        machine.wire_seconds(stage.flows["slices"], tp, 1) + machine.wire_seconds(stage.flows["expert slices"], etp, 1)
        for stage in stages
    )
    dispatch = max(machine.wire_seconds(stage.flows["dispatch"], ep, etp) for stage in stages)
    waiting = bubble_fraction(config, stages[0].num_micro_batches)
    busy = arithmetic + slices + dispatch
    between = parallel.pipeline_parallel_size
    # In more than one node some neighbouring stages lie in two, and the slowest pair counts.
    apart = of_stage if world_size <= GPUS_OF_A_NODE else GPUS_OF_A_NODE
    count = stages[0].num_micro_batches
    forward, backward = busy / count / 3, busy / count * 2 / 3

    def data_parallel(dense: CommBytes, expert: CommBytes) -> float:
        """Dense and expert parameters share the network."""
        return machine.wire_seconds(dense, of_stage // tp, tp) + machine.wire_seconds(
            expert, of_stage // (etp * ep), etp * ep
        )

    return StepTime(
        arithmetic=arithmetic,
        slices=slices,
        dispatch=dispatch,
        bubble=busy * waiting / (1 - waiting),
        pipeline=max(machine.wire_seconds(stage.flows["pipeline"], min(between, 2), apart) for stage in stages),
        gradients=max(
            max(0.0, data_parallel(rank.dense.share.gradients, rank.expert.share.gradients) - backward)
            for rank in worst
        ),
        newton_schulz=machine.arithmetic_seconds(newton_schulz_flops),
        matrices=max(
            data_parallel(rank.dense.share.matrices, rank.expert.share.matrices)
            + machine.wire_seconds(rank.dense.slices, tp, 1)
            + machine.wire_seconds(rank.expert.slices, etp, 1)
            for rank in worst
        ),
        weights=max(
            max(0.0, data_parallel(rank.dense.share.weights, rank.expert.share.weights) - forward) for rank in worst
        ),
    )
