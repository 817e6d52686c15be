"""A plan as text: tables for a terminal of 100 columns."""

import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from moonlight.plan.build import RunPlan, mean_memory
from moonlight.plan.figures import RESERVE, exchange_comm_bytes, layout, rank_comm_bytes
from moonlight.plan.flops import count_parameters, train_flops_per_token
from moonlight.plan.speed import bubble_fraction

WIDE = 200
"""Columns for the list of parameters where there is no terminal to fit: one line for each."""

NARROW = 100
"""Columns of all else."""

MAX_LIST = 14
"""Characters of a list of ranks."""

MEMORY_PARTS = {
    "weights": "of the model, in its dtype",
    "gradient_sums": "of every parameter, in optimizer.gradient_dtype",
    "gradient_shards": "the world's sums of its own rows, float32",
    "masters": "master weights of its own rows",
    "momenta": "of its own rows",
    "buffers": "router biases and counts",
    "activations": "{micro_batches} in flight on stage {stage}",
    "loss": "logits of a chunk, the head's gradient",
    "exchange": "gradients or weights sent and received",
    "update": "Newton-Schulz and matrices brought together",
}

WIRE_PARTS = {
    "gradients": "to their owners, in optimizer.gradient_dtype",
    "weights": "from their owners",
    "matrices": "parts of matrices brought together, and back",
    "slices": "tensor parallelism",
    "dispatch": "tokens to experts and back, uniform routing",
    "expert slices": "tensor parallelism of experts",
    "pipeline": "hidden states and their gradients",
}

SECONDS_PARTS = {
    "arithmetic": "forward and backward pass at {efficiency:g} of the peak",
    "slices": "tensor parallelism, not hidden",
    "dispatch": "tokens to experts and back, not hidden",
    "bubble": "waiting for other stages, {bubble:.1%} of their time",
    "pipeline": "between stages, not hidden",
    "gradients": "beyond the last micro-batch's backward pass",
    "newton_schulz": "of the rank with most",
    "matrices": "brought together and back, not hidden",
    "weights": "beyond the first micro-batch's forward pass",
}


def print_plan(plan: RunPlan, *, parameters: bool, console: Console | None = None) -> None:
    """Summary and tables and, if asked for, before them a table of every parameter.

    Into a file or a pipe goes one line for each parameter; on a terminal, layers are headings, so that names fit.
    """
    console = console or Console()
    if parameters:
        _print_parameters(plan, console)
    if not console.is_terminal:
        console.width = NARROW
    soft_wrap = not console.is_terminal  # a fact a line for whoever filters
    for text in [*summary(plan), fit(plan)]:
        console.print(text, soft_wrap=soft_wrap, highlight=False)
    for table in (_memory_table(plan), _wire_table(plan), _seconds_table(plan)):
        console.print()
        console.print(table, highlight=False)
    console.print()
    for text in conclusions(plan):
        console.print(text, soft_wrap=soft_wrap, highlight=False)


def _print_parameters(plan: RunPlan, console: Console) -> None:
    wide = not console.is_terminal
    if wide:
        console.width = WIDE
    table = Table("parameter", "shape", "rule", "decay", "matrices", "owner", box=None, padding=(0, 1, 0, 0))
    table.columns[0].overflow = "fold"
    layer = ""
    for line in plan.params:
        name = line.key
        if not wide and (found := re.match(r"decoder\.layers\.\d+\.", name)):
            if found[0] != layer:
                layer = found[0]
                table.add_row(layer)
            name = "  " + name.removeprefix(layer)
        matrices = (", " if wide else "\n").join(f"{n} of {_shape(shape)}" for shape, n in line.matrices.items())
        decay = "yes" if line.decay else "no"
        table.add_row(name, _shape(line.shape), line.algorithm, decay, matrices, ranges(line.owners))
    console.print(table)
    console.print("owner: among data-parallel ranks; for experts, among expert-data-parallel ranks\n")


def summary(plan: RunPlan) -> list[str]:
    """Layout, parameters, arithmetic, and the optimizer beside AdamW's, one line each."""
    config, counts, length = plan.config, count_parameters(plan.config.model), plan.config.data.sequence_length
    flops = train_flops_per_token(config.model, length)
    muon, adamw = plan.num_parameters("muon"), plan.num_parameters("adamw")
    state, base_state = [r.state for r in plan.optimizer_costs], max(a.state for a in plan.adamw)
    wire, base_wire = [max(r.sent, r.received) for r in plan.optimizer_costs], max(a.sent for a in plan.adamw)
    mean_state, mean_wire = sum(state) / len(state), sum(wire) / len(wire)
    return [
        f"{config.name} on {num_gpus(plan.world_size, plan.machine.name)}",
        f"layout: {layout(plan)}",
        f"parameters: {muon + adamw + plan.num_router_biases:,}, of them router biases {plan.num_router_biases:,}",
        f"optimizer: Muon for {muon:,} in {plan.num_matrices:,} matrices, AdamW for {adamw:,}",
        f"activated by a token: {counts.activated_with_head:,}, without the head {counts.activated:,}",
        f"training: {plan.num_tokens:,} tokens in {plan.timeline.num_steps:,} steps; {flops:.4g} FLOPs per token at "
        f"sequence length {length:,}",
        f"optimizer state of a rank: {format_bytes(max(state))} at most, mean {format_bytes(mean_state)}; "
        f"AdamW (ZeRO-1) {format_bytes(base_state)}{_ratio(max(state), base_state)}",
        f"sent or received for it in a step: {format_bytes(max(wire))} at most, mean {format_bytes(mean_wire)}; "
        f"AdamW (ZeRO-1) {format_bytes(base_wire)}{_ratio(max(wire), base_wire)}",
    ]


def _memory_table(plan: RunPlan) -> Table:
    fullest, mean = plan.memories[plan.peak_rank], mean_memory(plan.memories)
    stage = plan.rank_stage(plan.peak_rank)
    words = {
        "micro_batches": _count(
            stage.micro_batches_in_flight,
            "micro-batch" if plan.config.parallel.virtual_pipeline_parallel_size == 1 else "micro-batch of a chunk",
        ),
        "stage": stage.number,
    }
    table = _table("memory of a rank", f"fullest, rank {plan.peak_rank:,}", "mean", "")
    for name, what in MEMORY_PARTS.items():
        if getattr(mean, name):
            table.add_row(
                name.replace("_", " "),
                format_bytes(getattr(fullest, name)),
                format_bytes(getattr(mean, name)),
                what.format(**words),
            )
    peaks = sum(memory.peak for memory in plan.memories) / len(plan.memories)
    table.add_row("peak", format_bytes(fullest.peak), format_bytes(peaks), _parts_of_peak(plan))
    return table


def _parts_of_peak(plan: RunPlan) -> str:
    memory = plan.memories[plan.peak_rank]
    if memory.update > memory.passes:
        return "the most at once: during the update, without activations"
    smaller = "loss" if memory.exchange >= memory.loss else "exchange"
    return f"the most at once: without {smaller} and update"


def _wire_table(plan: RunPlan) -> Table:
    table = _table("wire, rank and step", "busiest", "mean", "sent or received, the larger")
    for name, what in WIRE_PARTS.items():
        flow_of = rank_comm_bytes(plan, name)
        flows = [flow_of(rank).larger for rank in range(len(plan.ranks))]
        if max(flows):
            table.add_row(name, format_bytes(max(flows)), format_bytes(sum(flows) / len(flows)), what)
        if name == "weights" and max(flows):
            dense, expert = exchange_comm_bytes(plan)
            table.add_row("  of dense parameters", format_bytes(dense), "", "gradients and weights together")
            table.add_row("  of experts", format_bytes(expert), "", "gradients and weights together")
    return table


def _seconds_table(plan: RunPlan) -> Table:
    seconds = plan.seconds
    table = _table("seconds of a step", f"batch {plan.global_batch_size:,}", "share", "")
    waiting = bubble_fraction(plan.config, plan.stages[0].num_micro_batches)
    words = {"bubble": waiting, "efficiency": plan.machine.efficiency}
    for name, what in SECONDS_PARTS.items():
        value = getattr(seconds, name)
        if value or name in ("gradients", "weights"):
            share = f"{value / seconds.total:.2%}"
            table.add_row(
                name.replace("_", "-" if name.startswith("n") else " "),
                format_seconds(value),
                share,
                what.format(**words),
            )
    table.add_row("step", format_seconds(seconds.total), "", _speed(plan))
    return table


def _speed(plan: RunPlan) -> str:
    rate = plan.tokens_per_step / plan.seconds.total
    return f"{rate:,.0f} tokens/s, {rate / plan.world_size:,.0f} a GPU"


def conclusions(plan: RunPlan) -> list[str]:
    """Newton-Schulz, days and checkpoint, one line each."""
    machine, gpu, config = plan.machine, plan.machine.gpu, plan.config
    works = [member.newton_schulz_flops for member in plan.ranks]
    busiest, mean = max(works), sum(works) / len(works)
    stage = plan.rank_stage(works.index(busiest))
    batches = plan.timeline.steps_by_batch_size()
    steps = ", ".join(f"{count:,} steps of {size:,}" for size, count in batches.items())
    lines = [
        f"Newton-Schulz: {busiest:.3g} FLOPs on the busiest rank, {busiest / (stage.flops + busiest):.3%} of its step; "
        + (f"its share is {busiest / mean:.2f} of the mean" if mean else "no matrices"),
        f"the whole recipe: {format_duration(plan.total_seconds)} ({steps} sequences)",
        f"checkpoint: {format_bytes(plan.checkpoint_bytes)} of float32 masters and momenta, "
        f"{plan.checkpoint_bytes / machine.storage_bytes_per_second:,.1f} s at "
        f"{machine.storage_bytes_per_second / 1e9:g} GB/s"
        + (", while training goes on" if config.train.async_save else ""),
        f"a model, not a measurement: {machine.efficiency:g} of {gpu.peak_flops_per_second / 1e12:g} TFLOP/s; links at "
        f"their full {gpu.node_bytes_per_second / 1e9:g} GB/s in a node of 8,",
        f"{gpu.network_bytes_per_second / 1e9:g} GB/s a GPU beyond; docs/planning.md says what it does not know",
    ]
    return lines


def fit(plan: RunPlan) -> str:
    """Whether the fullest rank fits its GPU, in one line."""
    peak, room = plan.memories[plan.peak_rank].peak, plan.machine.memory_bytes
    if peak > room:
        return (
            f"DOES NOT FIT: the fullest rank needs {format_bytes(peak)}, {format_bytes(peak - room)} more than the "
            f"{format_bytes(room)} of a GPU; "
            "--suggest searches layouts that do"
        )
    if peak > room * (1 - RESERVE):
        return (
            f"FITS ONLY JUST: the fullest rank needs {format_bytes(peak)} of {format_bytes(room)}; {RESERVE:.0%} "
            "should be left for what "
            "is not planned"
        )
    return f"fits: the fullest rank needs {format_bytes(peak)} of {format_bytes(room)}"


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in table.columns[1:3]:
        column.justify = "right"
        column.no_wrap = True
    table.columns[0].no_wrap = True
    return table


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what.replace('micro-batch', 'micro-batches')}"


def ranges(ranks: Sequence[int]) -> str:
    """Rising numbers in short: 0-3,7; or, were that long, how many lie from the first to the last: 20 in 0-63."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return text if len(text) <= MAX_LIST else f"{len(ranks)} in {ranks[0]}-{ranks[-1]}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def format_bytes(count: float) -> str:
    """Bytes in units of 10^9, 10^6 or 10^3."""
    if count >= 1e9:
        return f"{count / 1e9:,.2f} GB"
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.2f} kB"


def format_duration(seconds: float) -> str:
    """Days; hours, minutes or seconds if there is less than one."""
    if seconds >= 86400:
        return f"{seconds / 86400:,.2f} days"
    if seconds >= 3600:
        return f"{seconds / 3600:.2f} hours"
    return f"{seconds / 60:.2f} minutes" if seconds >= 60 else format_seconds(seconds)


def num_gpus(count: int, name: str) -> str:
    """So many of a kind."""
    return f"{count:,} {name} {'GPU' if count == 1 else 'GPUs'}"


def format_seconds(seconds: float) -> str:
    """With four digits or so."""
    if 0 < seconds < 0.1:
        return f"{seconds * 1e3:.2f} ms"
    return f"{seconds:.3f} s" if seconds < 10 else f"{seconds:,.2f} s"


def _ratio(count: float, base: float) -> str:
    return f", ratio {count / base:.3f}" if base else ""
