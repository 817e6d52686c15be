"""`moonlight plan --suggest`: the layouts of N GPUs that fit in memory, fastest first, and why the others do not.

Every layout is sketched with mean shares in place of owners; those that lead are then planned exactly.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from moonlight.config.parallel import ParallelConfig
from moonlight.config.run import RunConfig
from moonlight.errors import UserError
from moonlight.placement.comm_bytes import weight_bytes
from moonlight.plan.build import MemoryBreakdown, RunPlan, estimate_plan, make_plan
from moonlight.plan.figures import RESERVE, layout
from moonlight.plan.hardware import GPUS_OF_A_NODE, HardwareModel
from moonlight.plan.text import format_bytes

NUM_SHOWN = 10
MORE = 3
"""Layouts planned exactly beyond those, because exact times differ a little from those of sketches."""
MAX_EXACT = 30
"""At most so many, because some need more memory than their sketch."""

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
VIRTUAL_SIZES = (1, 2, 3, 4)
TENSOR_SIZES = (1, 2, 4, 8)
ROW_ALIGNMENT = 16
"""Bytes: torch's grouped GEMM wants rows of experts in multiples of it."""

FURTHEST = 4096
"""How far from N a count of GPUs that works is looked for."""


@dataclass(frozen=True)
class Suggestions:
    """What a search found."""

    config: RunConfig
    world_size: int
    machine: HardwareModel
    best: list[RunPlan]
    """Exact, fastest first."""
    num_layouts: int
    num_fitting: int
    """By their sketches."""
    reasons: list[tuple[int, str]]
    """How many layouts do not serve, and why."""


def suggest(config: RunConfig, world_size: int, machine: HardwareModel) -> Suggestions:
    """Search tensor, pipeline, virtual pipeline, expert and expert-tensor sizes, and micro-batch sizes.

    Raises:
        UserError: no layout divides the GPUs and the batches (nearby counts that work are named), or none fits in
            memory (what the best one lacks is named).
    """
    cuts = list(_cuts(config))
    possible = [cut for cut in cuts if cut is not None]
    reasons: Counter[str] = Counter()
    num_sizes = len(MICRO_BATCH_SIZES)
    reasons["heads, widths, experts or layers of the model do not divide"] = (len(cuts) - len(possible)) * num_sizes
    sketches: list[RunPlan] = []
    for cut in possible:
        if not _divides(cut.parallel, world_size):
            reasons[f"the sizes do not divide {world_size:,} GPUs"] += num_sizes
            continue
        for size in MICRO_BATCH_SIZES:
            candidate = replace(cut, train=replace(config.train, micro_batch_size=size))
            if not _batches_divide(candidate, world_size):
                reasons["a batch is no multiple of micro-batch size x data-parallel size (x stages, interleaved)"] += 1
                continue
            sketches.append(estimate_plan(candidate, world_size, machine))
    if not sketches:
        raise UserError(
            f"no layout divides {world_size} GPUs and the batches of {config.name}: nearby counts that work are "
            f"{', '.join(map(str, _nearby(config, possible, world_size))) or 'none'}"
        )
    room = machine.memory_bytes * (1 - RESERVE)
    fitting = sorted((s for s in sketches if _peak(s) <= room), key=lambda sketch: sketch.seconds.total)
    best: list[RunPlan] = []
    for index, sketch in enumerate(fitting):
        if index >= MAX_EXACT and best:
            break
        plan = make_plan(sketch.config, world_size, machine)
        if _peak(plan) <= room:
            best.append(plan)
        if len(best) == NUM_SHOWN + MORE:
            break
    if not best:
        smallest = make_plan(min(sketches, key=_peak).config, world_size, machine)
        if _peak(smallest) > room:
            raise UserError(_nothing_fits(config, world_size, machine, smallest))
        best.append(smallest)
    best.sort(key=lambda plan: plan.seconds.total)
    too_large = [sketch for sketch in sketches if _peak(sketch) > room]
    found = [(count, reason) for reason, count in reasons.items() if count]
    if too_large:
        found.append((len(too_large), _memory_reason(too_large, room)))
    num_layouts = sum(reasons.values()) + len(sketches)
    return Suggestions(config, world_size, machine, best[:NUM_SHOWN], num_layouts, max(len(fitting), len(best)), found)


def largest_part(memory: MemoryBreakdown) -> str:
    """Name of the part that takes most at the peak."""
    parts = asdict(memory)
    during = "update" if memory.update > memory.passes else "exchange" if memory.exchange > memory.loss else "loss"
    for part in {"update", "exchange", "loss"} - {during}:
        del parts[part]
    if during == "update":
        del parts["activations"]
    return max(parts, key=lambda part: parts[part]).replace("_", " ")


def _peak(plan: RunPlan) -> float:
    return plan.memories[plan.peak_rank].peak


def _cuts(config: RunConfig) -> Iterator[RunConfig | None]:
    """The recipe in every layout that may be worth a look; None for those that the model does not allow."""
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
                cut = replace(config, parallel=parallel)
            except UserError:
                yield None
                continue
            aligned = config.model.moe_intermediate_size // etp * weight_bytes(config) % ROW_ALIGNMENT == 0
            # More than a node's ranks in one tensor-parallel group are not looked at: every layer would wait for them.
            yield cut if aligned and tp <= GPUS_OF_A_NODE else None


def _divides(parallel: ParallelConfig, world_size: int) -> bool:
    try:
        parallel.data_parallel_size(world_size)
    except UserError:
        return False
    return True


def _batches_divide(config: RunConfig, world_size: int) -> bool:
    try:
        config.check_batches(world_size)
    except UserError:
        return False
    return True


def _nearby(config: RunConfig, possible: list[RunConfig], world_size: int) -> list[int]:
    """Up to two counts of GPUs below N and two above that some layout divides, nearest first."""
    smallest = [replace(cut, train=replace(config.train, micro_batch_size=1)) for cut in possible]

    def works(count: int) -> bool:
        return any(_divides(cut.parallel, count) and _batches_divide(cut, count) for cut in smallest)

    below = (count for count in range(world_size - 1, max(0, world_size - FURTHEST), -1) if works(count))
    above = (count for count in range(world_size + 1, world_size + FURTHEST) if works(count))
    found = [*itertools.islice(below, 2), *itertools.islice(above, 2)]
    return sorted(found)


def _nothing_fits(config: RunConfig, world_size: int, machine: HardwareModel, best: RunPlan) -> str:
    memory = best.memories[best.peak_rank]
    room = machine.memory_bytes * (1 - RESERVE)
    part = largest_part(memory)
    return (
        f"{config.name} fits on no layout of {world_size} {machine.name} GPUs: the best, {layout(best)}, needs "
        f"{format_bytes(memory.peak)}, {format_bytes(memory.peak - room)} more than {format_bytes(room)} "
        f"({1 - RESERVE:.0%} of a GPU); its largest "
        f"part is {part} with {format_bytes(getattr(memory, part.replace(' ', '_')))}"
    )


def _memory_reason(too_large: list[RunPlan], room: float) -> str:
    nearest = min(too_large, key=_peak)
    parts = Counter(largest_part(sketch.memories[sketch.peak_rank]) for sketch in too_large)
    text = ", ".join(f"{part} ({count:,})" for part, count in parts.most_common(3))
    return (
        f"memory is short, by {format_bytes(_peak(nearest) - room)} at best ({layout(nearest)}); the largest "
        f"part is {text}"
    )
