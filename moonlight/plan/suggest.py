"""`moonlight plan --suggest`: the layouts of N GPUs that fit in memory, fastest first, and why others are excluded.

The search estimates every layout with means over ranks, then plans the fastest estimates exactly.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

from moonlight.config.run import RunConfig
from moonlight.errors import UserError
from moonlight.placement.comm_bytes import weight_bytes
from moonlight.plan.build import MemoryBreakdown, RunPlan, estimate_plan, make_plan
from moonlight.plan.figures import RESERVE, describe_layout
from moonlight.plan.hardware import GPUS_PER_NODE, HardwareModel
from moonlight.plan.text import format_bytes

NUM_SHOWN = 10
NUM_EXTRA = 3
"""Additional layouts to plan exactly, because exact times differ a little from estimated times."""
MAX_EXACT = 30
"""Maximum number of exact plans. Some plans need more memory than their estimate and do not fit."""

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
VIRTUAL_SIZES = (1, 2, 3, 4)
TENSOR_SIZES = (1, 2, 4, 8)
ROW_ALIGNMENT = 16
"""Bytes. torch's grouped GEMM requires expert rows whose size is a multiple of it."""

MAX_GPU_DISTANCE = 4096
"""Maximum distance from N when searching for a usable number of GPUs."""


@dataclass(frozen=True)
class Suggestions:
    """Result of a search."""

    config: RunConfig
    world_size: int
    machine: HardwareModel
    best: list[RunPlan]
    """Exact plans, fastest first."""
    num_layouts: int
    num_fitting: int
    """Layouts that fit in memory according to their estimates."""
    reasons: list[tuple[int, str]]
    """(number of excluded layouts, reason)."""


def suggest(config: RunConfig, world_size: int, machine: HardwareModel) -> Suggestions:
    """Search tensor, pipeline, virtual pipeline, expert and expert-tensor sizes, and micro-batch sizes.

    Raises:
        UserError: no layout divides the GPUs and the batches (the message lists nearby counts that do), or none fits in
            memory (the message states by how much the best one exceeds it).
    """
    layouts = list(_layouts(config))
    possible = [layout for layout in layouts if layout is not None]
    reasons: Counter[str] = Counter()
    num_sizes = len(MICRO_BATCH_SIZES)
    num_impossible = (len(layouts) - len(possible)) * num_sizes
    reasons["the model's heads, widths, experts or layers are not divisible"] = num_impossible
    estimates: list[RunPlan] = []
    for layout in possible:
        if not _accepts(layout.parallel.data_parallel_size, world_size):
            reasons[f"the sizes do not divide {world_size:,} GPUs"] += num_sizes
            continue
        for size in MICRO_BATCH_SIZES:
            candidate = replace(layout, train=replace(config.train, micro_batch_size=size))
            if not _accepts(candidate.check_batches, world_size):
                reasons["a batch is no multiple of micro-batch size x data-parallel size (x stages, interleaved)"] += 1
                continue
            estimates.append(estimate_plan(candidate, world_size, machine))
    if not estimates:
        raise UserError(
            f"no layout divides {world_size} GPUs and the batches of {config.name}: nearby counts that work are "
            f"{', '.join(map(str, _nearby(config, possible, world_size))) or 'none'}"
        )
    usable_bytes = machine.memory_bytes * (1 - RESERVE)
    fitting = [estimate for estimate in estimates if _peak(estimate) <= usable_bytes]
    fitting.sort(key=lambda estimate: estimate.seconds.total)
    best: list[RunPlan] = []
    for index, estimate in enumerate(fitting):
        if index >= MAX_EXACT and best:
            break
        plan = make_plan(estimate.config, world_size, machine)
        if _peak(plan) <= usable_bytes:
            best.append(plan)
        if len(best) == NUM_SHOWN + NUM_EXTRA:
            break
    if not best:
        smallest = make_plan(min(estimates, key=_peak).config, world_size, machine)
        if _peak(smallest) > usable_bytes:
            raise UserError(_nothing_fits(config, world_size, machine, smallest))
        best.append(smallest)
    best.sort(key=lambda plan: plan.seconds.total)
    too_large = [estimate for estimate in estimates if _peak(estimate) > usable_bytes]
    excluded = [(count, reason) for reason, count in reasons.items() if count]
    if too_large:
        excluded.append((len(too_large), _memory_reason(too_large, usable_bytes)))
    num_layouts = sum(reasons.values()) + len(estimates)
    num_fitting = max(len(fitting), len(best))
    return Suggestions(config, world_size, machine, best[:NUM_SHOWN], num_layouts, num_fitting, excluded)


def largest_part(memory: MemoryBreakdown) -> str:
    """Return the name of the largest memory part at the peak."""
    parts = asdict(memory)
    during = "update" if memory.update > memory.passes else "exchange" if memory.exchange > memory.loss else "loss"
    for part in {"update", "exchange", "loss"} - {during}:
        del parts[part]
    if during == "update":
        del parts["activations"]
    return max(parts, key=lambda part: parts[part]).replace("_", " ")


def _peak(plan: RunPlan) -> float:
    return plan.memories[plan.peak_rank].peak


def _layouts(config: RunConfig) -> Iterator[RunConfig | None]:
    """Yield the recipe in every candidate layout; None if the model does not allow the layout."""
    layers = config.model.num_hidden_layers
    stages = [size for size in range(1, layers + 2) if layers % size == 0 or (layers + 1) % size == 0]
    experts = [size for size in range(1, config.model.num_experts + 1) if config.model.num_experts % size == 0]
    for tp, pp, vpp, ep in itertools.product(TENSOR_SIZES, stages, VIRTUAL_SIZES, experts):
        if vpp > 1 and pp == 1:
            continue
        for etp in dict.fromkeys((1, tp)):
            parallel = replace(
                config.parallel,
                tensor_parallel_size=tp,
                pipeline_parallel_size=pp,
                virtual_pipeline_parallel_size=vpp,
                expert_parallel_size=ep,
                expert_tensor_parallel_size=etp,
            )
            try:
                layout = replace(config, parallel=parallel)
            except UserError:
                yield None
                continue
            aligned = config.model.moe_intermediate_size // etp * weight_bytes(config) % ROW_ALIGNMENT == 0
            # A tensor-parallel group stays within a node. Otherwise every layer waits for the network.
            yield layout if aligned and tp <= GPUS_PER_NODE else None


def _accepts(check: Callable[[int], object], world_size: int) -> bool:
    try:
        check(world_size)
    except UserError:
        return False
    return True


def _nearby(config: RunConfig, possible: list[RunConfig], world_size: int) -> list[int]:
    """Return up to two GPU counts below N and two above that some layout divides, in ascending order."""
    smallest = [replace(layout, train=replace(config.train, micro_batch_size=1)) for layout in possible]

    def works(count: int) -> bool:
        return any(_accepts(layout.check_batches, count) for layout in smallest)

    below = (count for count in range(world_size - 1, max(0, world_size - MAX_GPU_DISTANCE), -1) if works(count))
    above = (count for count in range(world_size + 1, world_size + MAX_GPU_DISTANCE) if works(count))
    return sorted([*itertools.islice(below, 2), *itertools.islice(above, 2)])


def _nothing_fits(config: RunConfig, world_size: int, machine: HardwareModel, best: RunPlan) -> str:
    memory = best.memories[best.peak_rank]
    usable_bytes = machine.memory_bytes * (1 - RESERVE)
    part = largest_part(memory)
    return (
        f"{config.name} fits on no layout of {world_size} {machine.name} GPUs: the best, {describe_layout(best)}, "
        f"needs {format_bytes(memory.peak)}, {format_bytes(memory.peak - usable_bytes)} more than "
        f"{format_bytes(usable_bytes)} ({1 - RESERVE:.0%} of a GPU); its largest "
        f"part is {part} with {format_bytes(getattr(memory, part.replace(' ', '_')))}"
    )


def _memory_reason(too_large: list[RunPlan], usable_bytes: float) -> str:
    nearest = min(too_large, key=_peak)
    parts = Counter(largest_part(estimate.memories[estimate.peak_rank]) for estimate in too_large)
    text = ", ".join(f"{part} ({count:,})" for part, count in parts.most_common(3))
    return (
        f"memory is short, by {format_bytes(_peak(nearest) - usable_bytes)} at best ({describe_layout(nearest)}); "
        f"the largest part is {text}"
    )
